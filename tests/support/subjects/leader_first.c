/* The leader ends by pthread_exit while a thread runs on; that thread touches 10 pages, then ends the process. */
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

static void *last(void *unused)
{
	volatile char *p = mmap(0, 10 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	usleep(100000); /* the leader is a zombie by then */
	for (int i = 0; i < 10; i++)
		p[i * 4096] = 1;
	printf("%p\n", (void *)p);
	fflush(stdout);
	return unused;
}

int main(void)
{
	pthread_t thread;

	pthread_create(&thread, 0, last, 0);
	pthread_exit(0);
}
