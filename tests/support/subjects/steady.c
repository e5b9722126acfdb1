/* A program that notices if anything disturbs it: integer, SSE and AVX registers held across loops, timers and
 * signals with handlers (one on an alternate stack), threads that come and go, timed waits. It ends itself
 * with a message and code 9 at the first wrong result; on "check\n" it prints its counters and a checksum.
 */
#pragma GCC target("avx")
#define _GNU_SOURCE
#include <errno.h>
#include <immintrin.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_long signals_seen, threads_made, rounds, waits;
static char table[64 * 4096];

static void wrong(const char *what, long got)
{
	char text[128];
	int n = snprintf(text, sizeof(text), "WRONG %s %ld\n", what, got);
	if (write(1, text, (size_t)n) < 0)
		_exit(10);
	_exit(9);
}

static void on_signal(int sig)
{
	volatile __m256d mine = _mm256_set1_pd(sig);
	(void)mine;
	atomic_fetch_add(&signals_seen, 1);
}

static void registers(unsigned seed)
{
	__m256d v = _mm256_set_pd(seed, seed + 1, seed + 2, seed + 3), one = _mm256_set1_pd(1.0);
	long a = seed, b = seed + 1, c = seed + 2, d = seed + 3;
	for (int i = 0; i < 20000; i++) {
		v = _mm256_add_pd(v, one);
		a += 1;
		b += 2;
		c += 3;
		d += 4;
		__asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+x"(v));
	}
	double out[4];
	_mm256_storeu_pd(out, v);
	if (a != seed + 20000l || b != seed + 1 + 40000l || c != seed + 2 + 60000l || d != seed + 3 + 80000l)
		wrong("registers", a);
	if (out[3] != seed + 20000.0 || out[0] != seed + 3 + 20000.0)
		wrong("vector", (long)out[3]);
}

static void *spinner(void *arg)
{
	unsigned seed = (unsigned)(unsigned long)arg;
	for (;;) {
		registers(seed++ & 0xffff);
		atomic_fetch_add(&rounds, 1);
		table[(seed % 64) * 4096 + seed % 4096] = (char)seed;
		struct timespec ts = {0, 200000};
		nanosleep(&ts, NULL); /* EINTR here comes from its own timer */
	}
	return NULL;
}

static void *brief(void *arg)
{
	registers((unsigned)(unsigned long)arg);
	return NULL;
}

static void *churn(void *arg)
{
	for (unsigned long i = 1;; i++) {
		pthread_t t;
		if (pthread_create(&t, NULL, brief, (void *)(i & 0xff)))
			wrong("thread", errno);
		pthread_join(t, NULL);
		atomic_fetch_add(&threads_made, 1);
		usleep(500);
	}
	return arg;
}

/* Waits that no signal interrupts (all blocked): any early return was caused from outside. */
static void *waiter(void *arg)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	int ep = epoll_create1(0), fds[2];
	if (pipe(fds))
		wrong("pipe", errno);
	struct epoll_event ev = {.events = EPOLLIN};
	epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &ev);
	for (unsigned i = 0;; i++) {
		struct timespec before, after, nap = {0, 20000000};
		clock_gettime(CLOCK_MONOTONIC, &before);
		int got = 0;
		switch (i % 3) {
		case 0: got = epoll_wait(ep, &ev, 1, 20); break;
		case 1: { struct pollfd p = {fds[0], POLLIN, 0}; got = poll(&p, 1, 20); break; }
		case 2: got = nanosleep(&nap, NULL); break;
		}
		clock_gettime(CLOCK_MONOTONIC, &after);
		if (got)
			wrong("wait", errno);
		long ms = (after.tv_sec - before.tv_sec) * 1000 + (after.tv_nsec - before.tv_nsec) / 1000000;
		if (ms < 19)
			wrong("early", ms);
		atomic_fetch_add(&waits, 1);
	}
	return arg;
}

int main(void)
{
	stack_t ss = {.ss_sp = malloc(65536), .ss_size = 65536};
	sigaltstack(&ss, NULL);
	struct sigaction sa = {.sa_handler = on_signal, .sa_flags = SA_RESTART | SA_ONSTACK};
	sigaction(SIGALRM, &sa, NULL);
	sa.sa_flags = SA_RESTART;
	sigaction(SIGUSR1, &sa, NULL);
	pthread_t t;
	pthread_create(&t, NULL, waiter, NULL);
	struct itimerval it = {{0, 3000}, {0, 3000}};
	setitimer(ITIMER_REAL, &it, NULL);
	for (unsigned long i = 0; i < 2; i++)
		pthread_create(&t, NULL, spinner, (void *)(i * 1000));
	pthread_create(&t, NULL, churn, NULL);
	printf("%d\n", getpid());
	fflush(stdout);
	char line[64];
	while (fgets(line, sizeof(line), stdin)) {
		printf("ok %ld %ld %ld %ld\n", atomic_load(&signals_seen), atomic_load(&threads_made),
		       atomic_load(&rounds), atomic_load(&waits));
		fflush(stdout);
	}
	return 0;
}
