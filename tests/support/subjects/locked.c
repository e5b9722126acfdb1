/* Locked memory in all its ways: mlockall for the future, stacks of threads (mapped without rights, then made
 * writable), unlocking, growth by mremap and brk, MLOCK_ONFAULT, a populate that fails half-way. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#define P 4096UL

static void *work(void *arg)
{
	return arg;
}

static char *map(unsigned long pages, int prot)
{
	return mmap(NULL, pages * P, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

int main(void)
{
	pthread_t thread;
	char *first, *grown, *half, *late;

	mlockall(MCL_CURRENT | MCL_FUTURE);
	first = map(64, PROT_READ | PROT_WRITE);
	pthread_create(&thread, NULL, work, NULL);
	pthread_join(thread, NULL);
	grown = mremap(map(16, PROT_READ | PROT_WRITE), 16 * P, 48 * P, MREMAP_MAYMOVE);
	half = map(32, PROT_NONE);
	mprotect(half + 8 * P, 8 * P, PROT_READ | PROT_WRITE);
	mprotect(half + 16 * P, 8 * P, PROT_READ);
	sbrk(10 * P);
	mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);
	late = map(20, PROT_READ | PROT_WRITE);
	late[3 * P] = 1;
	munlockall();
	madvise(first, 32 * P, MADV_DONTNEED);
	first = map(40, PROT_READ | PROT_WRITE);
	munmap(first + 20 * P, P);
	mprotect(first + 30 * P, P, PROT_NONE);
	mlock(first + 22 * P, 18 * P); /* populated up to what has no rights */
	mlock(first, 25 * P); /* ends at the hole, nothing populated */
	madvise(first, 32 * P, MADV_POPULATE_READ); /* up to the hole */
	return grown == MAP_FAILED;
}
