/* A known list of memory calls, from two processes and two threads, with the faults that the kernel makes for each:
 * prints "ADDRESS checksum". Signals arrive meanwhile. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
static volatile int ticks;

static void tick(int sig)
{
	(void)sig;
	ticks++;
}

static char *map(size_t pages, int flags)
{
	return mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static void *thread(void *arg)
{
	char *p = map(3, 0);

	p[0] = 1;
	munmap(p, 3 * PAGE);
	return arg;
}

int main(void)
{
	struct itimerval every = { { 0, 5000 }, { 0, 5000 } };
	unsigned long sum = 0;
	pthread_t t;
	char *p, *q;
	int status;

	signal(SIGALRM, tick);
	setitimer(ITIMER_REAL, &every, NULL);
	p = map(64, MAP_POPULATE);
	q = map(32, 0);
	mlock(q, 32 * PAGE);
	munlock(q, 32 * PAGE);
	for (int i = 0; i < 64; i++)
		sum += (unsigned char)(p[i * PAGE] = (char)i);
	madvise(p, 16 * PAGE, MADV_DONTNEED);
	for (int i = 0; i < 16; i++)
		sum += (unsigned char)p[i * PAGE] + 1;
	q = mremap(q, 32 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
	mprotect(q, 64 * PAGE, PROT_READ);
	pthread_create(&t, NULL, thread, NULL);
	pthread_join(t, NULL);
	if (!fork()) {
		munmap(q, 64 * PAGE);
		p[40 * PAGE] = 1;
		_exit(7);
	}
	wait(&status);
	while (ticks < 3)
		pause();
	munmap(q, 64 * PAGE);
	printf("%p %lu %d\n", (void *)p, sum, WEXITSTATUS(status));
	return 3;
}
