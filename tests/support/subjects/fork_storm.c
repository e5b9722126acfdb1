/* Forks all the time, from two threads, until SIGINT; each child writes pages and checks them, and every second one forks
 * a child of its own. Exit code 0: no child ever ended otherwise than it should. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 40

static volatile sig_atomic_t stop;
static volatile int bad;

static void on_signal(int sig)
{
	(void)sig;
	stop = 1;
}

static int child(int forks)
{
	char *p = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int status = 0, wrong = p == MAP_FAILED;

	for (int i = 0; !wrong && i < PAGES; i++)
		p[i * 4096] = (char)i;
	if (!wrong && forks) {
		pid_t pid = fork();

		if (!pid) {
			for (int i = 0; i < 10; i++)
				p[i * 4096] = 99;       /* its own copies */
			_exit(p[11 * 4096] != 11);
		}
		wrong |= waitpid(pid, &status, 0) != pid || status;
	}
	for (int i = 0; !wrong && i < PAGES; i++)
		wrong |= p[i * 4096] != (char)i;
	return wrong;
}

static void *work(void *forks)
{
	while (!stop) {
		int status = 0;
		pid_t pid = fork();

		if (!pid)
			_exit(child(forks != NULL));
		if (waitpid(pid, &status, 0) != pid || status)
			bad = 1;
	}
	return NULL;
}

int main(void)
{
	struct sigaction act = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	pthread_t threads[2];

	sigaction(SIGINT, &act, NULL);
	for (long i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, work, (void *)i);
	puts("ready");
	fflush(stdout);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	return bad;
}
