/* For each address given (hexadecimal): 16 pages there, each written once, all dropped, the fourth written again. */
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE 4096

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		void *place = (void *)strtoul(argv[i], NULL, 16);
		volatile char *p = mmap(place, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		if (p == MAP_FAILED)
			return 1;
		for (int k = 0; k < 16; k++)
			p[k * PAGE] = 1;
		madvise(place, 16 * PAGE, MADV_DONTNEED);
		p[3 * PAGE] = 1;
	}
	return 0;
}
