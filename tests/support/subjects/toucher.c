/* Writes to N fresh pages one after the other, after printing where they are. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

int main(int argc, char **argv)
{
	long n = argc > 1 ? atol(argv[1]) : 1024, i;
	char *p = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		return 3;
	madvise(p, n * 4096, MADV_NOHUGEPAGE);
	printf("%p\n", p);
	fflush(stdout);
	for (i = 0; i < n; i++)
		p[i * 4096] = 1;
	return 0;
}
