/* Threads whose last act is to fault: no call, and no other switch, comes between that and their end. Runs until it is
 * killed. */
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>

#define THREADS 4
#define PAGES 20L

static char *region;

static void *work(void *a)
{
	char *p = region + (long)a * 32 * 4096;

	for (long i = 0; i < PAGES; i++)
		p[i * 4096] = 1;
	return NULL;
}

int main(void)
{
	region = mmap(NULL, THREADS * 32 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (region == MAP_FAILED)
		return 3;
	puts("ready");
	fflush(stdout);
	for (;;) {
		pthread_t t[THREADS];

		for (long i = 0; i < THREADS; i++)
			if (pthread_create(&t[i], NULL, work, (void *)i))
				return 4;
		for (int i = 0; i < THREADS; i++)
			pthread_join(t[i], NULL);
		madvise(region, THREADS * 32 * 4096, MADV_DONTNEED);
	}
}
