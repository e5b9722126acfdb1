/* Three threads of argv[1] pages each, of which the third is started late: prints where, then does on each line of
 * stdin the next step (both first threads touch; the third is started and touches), prints "done", ends at EOF. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static volatile char *area;
static size_t n;
static pthread_barrier_t ready, go;

static void touch(size_t part)
{
	for (size_t i = 0; i < n; i++)
		area[(part * n + i) * 4096] = 1;
}

static void *waiting(void *part)
{
	pthread_barrier_wait(&ready);
	pthread_barrier_wait(&go);
	touch((size_t)part);
	pthread_barrier_wait(&ready);
	pthread_barrier_wait(&go);
	return 0;
}

static void *late(void *part)
{
	touch((size_t)part);
	return 0;
}

int main(int argc, char **argv)
{
	pthread_t threads[3];

	n = argc > 1 ? strtoul(argv[1], 0, 0) : 1;
	area = mmap(0, 3 * n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area == MAP_FAILED)
		return 1;
	madvise((void *)area, 3 * n * 4096, MADV_NOHUGEPAGE);
	pthread_barrier_init(&ready, 0, 3);
	pthread_barrier_init(&go, 0, 3);
	pthread_create(&threads[0], 0, waiting, (void *)0);
	pthread_create(&threads[1], 0, waiting, (void *)1);
	pthread_barrier_wait(&ready);
	printf("%p\n", (void *)area);
	fflush(stdout);
	getchar();
	pthread_barrier_wait(&go);
	pthread_barrier_wait(&ready);
	pthread_create(&threads[2], 0, late, (void *)2);
	pthread_join(threads[2], 0);
	puts("done");
	fflush(stdout);
	getchar();
	pthread_barrier_wait(&go);
	pthread_join(threads[0], 0);
	pthread_join(threads[1], 0);
	return 0;
}
