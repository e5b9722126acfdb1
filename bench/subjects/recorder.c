/* What bench/recorder.py times: it prints the user+system time of its own work in microseconds.
 *   faults N    N first-touch faults
 *   forks N     N times fork, exit, wait
 *   threads N   N times thread create and join
 *   switches N  N round trips between two processes over pipes
 *   calls N     N times getppid
 *   spin S      arithmetic for about S seconds
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double used(int who)
{
	struct rusage r;

	getrusage(who, &r);
	return (r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1e6 + r.ru_utime.tv_usec + r.ru_stime.tv_usec;
}

static void *nothing(void *a) { return a; }

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "faults";
	long n = argc > 2 ? atol(argv[2]) : 262144, i;
	double begin = used(RUSAGE_SELF) + used(RUSAGE_CHILDREN);
	volatile unsigned long x = 1;

	if (!strcmp(what, "faults")) {
		char *p = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (p == MAP_FAILED)
			return 3;
		madvise(p, n * 4096, MADV_NOHUGEPAGE);
		begin = used(RUSAGE_SELF);
		for (i = 0; i < n; i++)
			p[i * 4096] = 1;
	} else if (!strcmp(what, "forks")) {
		for (i = 0; i < n; i++) {
			pid_t pid = fork();

			if (!pid)
				_exit(0);
			waitpid(pid, NULL, 0);
		}
	} else if (!strcmp(what, "threads")) {
		for (i = 0; i < n; i++) {
			pthread_t t;

			pthread_create(&t, NULL, nothing, NULL);
			pthread_join(t, NULL);
		}
	} else if (!strcmp(what, "switches")) {
		int a[2], b[2];
		char c = 0;
		pid_t pid;

		if (pipe(a) || pipe(b))
			return 3;
		pid = fork();
		if (!pid) {
			close(a[1]);
			while (read(a[0], &c, 1) == 1)
				if (write(b[1], &c, 1) != 1)
					break;
			_exit(0);
		}
		for (i = 0; i < n; i++)
			if (write(a[1], &c, 1) != 1 || read(b[0], &c, 1) != 1)
				return 4;
		close(a[1]);
		waitpid(pid, NULL, 0);
	} else if (!strcmp(what, "calls")) {
		for (i = 0; i < n; i++)
			syscall(SYS_getppid);
	} else {
		time_t end = time(NULL) + n;

		/* A fixed amount of work: about n seconds on a machine of 2024. */
		(void)end;
		for (i = 0; i < n * 1500000000L; i++)
			x = x * 3 + 1;
	}
	fprintf(stderr, "used %.0f\n", used(RUSAGE_SELF) + used(RUSAGE_CHILDREN) - begin);
	return 0;
}
