/* Fills a big malloc, then starts threads that only sleep. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static size_t size = 100UL << 20;

static void stage(const char *name)
{
	printf("stage %s\n", name);
	fflush(stdout);
	getchar();
}

static void *sleeper(void *stack)
{
	*(volatile void **)stack = (void *)&stack;
	for (;;)
		sleep(100);
	return NULL;
}

static void *start(const char *name)
{
	pthread_t thread;
	void *volatile local = NULL;

	if (pthread_create(&thread, NULL, sleeper, (void *)&local))
		_exit(3);
	while (!local)
		usleep(100);
	printf("%s=%p\n", name, local);
	return local;
}

int main(int argc, char **argv)
{
	char *p;

	if (argc > 1)
		size = strtoul(argv[1], NULL, 10) << 20;
	p = malloc(size);
	memset(p, 1, size);
	printf("pid=%d malloc=%p size=%#zx\n", getpid(), (void *)p, size);
	stage("filled");
	start("stack1");
	stage("thread1");
	memset(p, 2, size / 5);
	stage("written1");
	start("stack2");
	stage("thread2");
	memset(p, 3, size / 5);
	stage("written2");
	return 0;
}
