/* What the programs that know the true causes of their faults share: a log of accesses, in memory of all processes,
 * and ways to read and write that note what they did. One line of the log: tid before_ns after_ns address cause faults
 * where `faults` says how many fault events the access must have made (-1: any, a race).
 */
#ifndef CAUSES_LOG_H
#define CAUSES_LOG_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define HUGE (2UL << 20)
#define MAX_LOG 200000

struct entry {
	int tid, faults;
	uint64_t before, after, addr;
	const char *cause;
};
struct shared {
	atomic_int used, target;
	struct entry log[MAX_LOG];
};
static struct shared *sh;
static __thread uint64_t rng;
static __thread sigjmp_buf jump;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static uint64_t rnd(uint64_t n)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng % n;
}

static void die(const char *what)
{
	perror(what);
	_exit(3);
}

static void note(uint64_t before, volatile void *addr, const char *cause, int faults)
{
	uint64_t after = now();
	int i = atomic_fetch_add(&sh->used, 1);

	if (i >= MAX_LOG)
		_exit(4);
	sh->log[i] = (struct entry){ syscall(SYS_gettid), faults, before, after, (uint64_t)addr, cause };
}

static void put(volatile char *p, const char *cause, int faults)
{
	uint64_t t = now();

	*p = (char)t | 1;
	note(t, p, cause, faults);
}

static char get(volatile char *p, const char *cause, int faults)
{
	uint64_t t = now();
	char c = *p;

	note(t, p, cause, faults);
	return c;
}

static void on_fault(int sig)
{
	(void)sig;
	siglongjmp(jump, 1);
}

static void bad(volatile char *p, int write, const char *cause)
{
	uint64_t t = now();

	if (!sigsetjmp(jump, 1)) {
		if (write)
			*p = 1;
		else
			(void)*p;
		_exit(5);       /* it must not succeed */
	}
	note(t, p, cause, 1);
}

static char *map(size_t pages, int prot, int flags, int fd, off_t off)
{
	char *p = mmap(NULL, pages * PAGE, prot, flags, fd, off);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

static char *anon(size_t pages)
{
	return map(pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static int write_log(const char *path)
{
	FILE *out = fopen(path, "w");

	if (!out)
		die(path);
	for (int i = 0; i < atomic_load(&sh->used); i++) {
		struct entry *e = &sh->log[i];

		fprintf(out, "%d %llu %llu %llu %s %d\n", e->tid, (unsigned long long)e->before,
			(unsigned long long)e->after, (unsigned long long)e->addr, e->cause, e->faults);
	}
	return fclose(out) ? 1 : 0;
}

static void begin_log(int target)
{
	struct sigaction act = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };

	sh = mmap(NULL, sizeof(*sh), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (sh == MAP_FAILED)
		die("mmap");
	atomic_store(&sh->target, target);
	sigaction(SIGSEGV, &act, NULL);
	sigaction(SIGBUS, &act, NULL);
	now();
}
#endif
