/* Maps argv[1] pages and prints where; a child writes to each, then (once it has gone) the parent does. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	size_t n = argc > 1 ? strtoul(argv[1], 0, 0) : 1;
	volatile char *p = mmap(0, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pid_t child;

	if (p == MAP_FAILED)
		return 1;
	madvise((void *)p, n * 4096, MADV_NOHUGEPAGE);
	printf("%p\n", (void *)p);
	fflush(stdout);
	child = fork();
	for (size_t i = 0; child || i < n; i++) {
		if (child) {
			waitpid(child, 0, 0);
			child = 0;
			i = (size_t)-1;
			continue;
		}
		p[i * 4096] = 1;
	}
	return 0;
}
