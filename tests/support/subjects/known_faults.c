/* Known numbers of faults of each sort, at addresses that it prints. No libc call between the phases but raw
 * system calls, so that nothing else faults in these ranges. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define P 4096L
static sigjmp_buf back;
static volatile int caught;

static void on_segv(int s)
{
	(void)s;
	caught++;
	siglongjmp(back, 1);
}

static char *range(long pages)
{
	char *p = mmap(NULL, pages * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		exit(3);
	madvise(p, pages * P, MADV_NOHUGEPAGE);
	return p;
}

int main(void)
{
	char *plain = range(300), *read_first = range(40), *kernel = range(24), *bad = range(16), *none;
	char *populated, *locked = range(32), *advised = range(20);
	int fd = open("/dev/zero", O_RDONLY);
	long i;

	for (i = 0; i < 300; i++)
		plain[i * P] = 1;
	for (i = 0; i < 40; i++)
		(void)*(volatile char *)(read_first + i * P);
	for (i = 0; i < 40; i++)
		read_first[i * P] = 1;
	if (read(fd, kernel, 24 * P) != 24 * P)
		return 4;
	populated = mmap(NULL, 64 * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (mlock(locked, 32 * P))
		return 5;
	if (madvise(advised, 20 * P, 23))       /* MADV_POPULATE_WRITE */
		return 6;
	mprotect(bad, 16 * P, PROT_NONE);
	signal(SIGSEGV, on_segv);
	for (i = 0; i < 16; i++)
		if (!sigsetjmp(back, 1))
			bad[i * P] = 1;
	none = range(1);
	munmap(none, P);
	if (!sigsetjmp(back, 1))
		*none = 1;
	/* A kernel access that gives up: EFAULT. */
	if (read(fd, none, 1) != -1)
		return 7;
	printf("%p %p %p %p %p %p %p %d\n", plain, read_first, kernel, bad, none, populated, locked, caught);
	fflush(stdout);
	/* A fault at exit time: the kernel reads the robust list's head, which was never touched. */
	none = range(1);
	syscall(SYS_set_robust_list, none, 24);
	printf("%p\n", none);
	fflush(stdout);
	syscall(SYS_exit, 0);
	return 0;
}
