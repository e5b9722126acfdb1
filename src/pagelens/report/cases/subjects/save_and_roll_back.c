/* Fills a range, changes a part of it on request, and prints a checksum of all of it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 12800UL

static unsigned long sum(const unsigned char *p)
{
	unsigned long s = 1;

	for (unsigned long i = 0; i < PAGES * 4096; i += 64)
		s = s * 31 + p[i];
	return s;
}

int main(void)
{
	unsigned char *p = mmap(NULL, PAGES * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char out[64], in;
	int n;

	for (unsigned long i = 0; i < PAGES; i++)
		memset(p + i * 4096, (int)(i * 7 + 1), 4096);
	printf("pid=%d start=%p pages=%lu\nstage filled\n", getpid(), (void *)p, PAGES);
	fflush(stdout);
	for (;;) {
		if (read(0, &in, 1) != 1)
			return 0;
		if (in == 'w') /* a fifth of the pages */
			for (unsigned long i = 0; i < PAGES; i += 5)
				p[i * 4096] ^= 0x55;
		n = snprintf(out, sizeof(out), "sum=%lx\nstage ready\n", sum(p));
		if (write(1, out, n) != n)
			return 3;
	}
}
