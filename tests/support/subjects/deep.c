/* A call chain without frame pointers that ends in one first touch: outer -> middle -> inner. With argv[1] "hold" it
 * prints the page and waits in inner, so that its registers can be read. Locals keep each frame 64 bytes or more. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile char *page;
static int hold;

__attribute__((noinline)) int inner(int n)
{
	volatile char local[64];

	memset((char *)local, n, sizeof local);
	if (hold) {
		printf("%p\n", (void *)page);
		fflush(stdout);
		for (;;)
			local[0]++;
	}
	page[0] = local[n];
	return local[1];
}

__attribute__((noinline)) int middle(int n)
{
	volatile int local[16];

	local[n] = inner(n + 1);
	return local[n] + 1;
}

__attribute__((noinline)) int outer(int n)
{
	volatile int local[16];

	local[n] = middle(n + 1);
	return local[n] + 1;
}

int main(int argc, char **argv)
{
	hold = argc > 1 && !strcmp(argv[1], "hold");
	page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return outer(argc & 3) == 42;
}
