/* Fills PAGES pages with a known pattern and keeps them. When the file argv[1] appears it writes the pattern's sum, once
 * more from memory, to argv[2], and ends. For debuggers and savers: globals with known values, a call chain, no input. */
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGES = 300 };
unsigned char *kept;
unsigned long kept_sum;

static unsigned long sum(void)
{
	unsigned long total = 0;

	for (long i = 0; i < PAGES * 4096L; i++)
		total += kept[i];
	return total;
}

static __attribute__((noinline)) void wait_for(const char *path)
{
	while (access(path, F_OK))
		usleep(20000);
}

int main(int argc, char **argv)
{
	FILE *answer;

	if (argc < 3)
		return 2;
	kept = mmap(NULL, PAGES * 4096L, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (kept == MAP_FAILED)
		return 3;
	for (long i = 0; i < PAGES * 4096L; i++)
		kept[i] = (unsigned char)(i * 7 + i / 4096);
	kept_sum = sum();
	wait_for(argv[1]);
	answer = fopen(argv[2], "w");
	if (!answer)
		return 4;
	fprintf(answer, "%d %lu\n", getpid(), sum());
	return fclose(answer) != 0;
}
