/* The SIGSEGV write barrier of backend `mprotect` (this process only).
 *
 * Watched pages are read-only; the first write faults, the handler marks the page in a bitmap, makes it
 * writable and returns, and the store is made again. Rules that keep the host program whole:
 * - the handler uses nothing but atomic loads and stores and mprotect(2): it may run in any thread, on any
 *   stack (SA_ONSTACK), inside malloc, inside another handler;
 * - a fault that is not ours goes to the program's own handler, with the siginfo, context and mask that it
 *   asked for; where it had none, the default is restored and the access faults again, so that the core dump
 *   shows the true place;
 * - after fork the child has protections, bitmap and handler of its own (copy on write) and goes on;
 * - a page found marked already was opened by another thread a moment ago: the store is simply tried again.
 *   Tried in vain many times, it is a fault of the program's making, and goes to the program.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pagelens.h"

#define PAGE_BITS 12
#define MAX_REGIONS 4096
#define MAX_RETRIES 200

struct region {
	uintptr_t start;
	size_t pages;
	int prot;               /* what the program gave it */
	_Atomic uint64_t *dirty; /* one bit a page */
};

static struct region regions[MAX_REGIONS]; /* ascending; changed only while `changing` keeps handlers out */
static atomic_int n_regions, users, changing;
static struct sigaction before;
static atomic_int installed;
static _Atomic uint64_t caught;
/* initial-exec: __tls_get_addr may allocate, and a handler must not. */
static __thread uintptr_t last_addr __attribute__((tls_model("initial-exec")));
static __thread int retries __attribute__((tls_model("initial-exec")));

PL_EXPORT int pl_barrier_install(void);
PL_EXPORT void pl_barrier_remove(void);
PL_EXPORT int pl_barrier_is_ours(void);
PL_EXPORT int pl_barrier_add(uintptr_t start, size_t pages, int prot, uint64_t *bitmap);
PL_EXPORT int pl_barrier_drop(uintptr_t start);
PL_EXPORT int pl_barrier_protect(uintptr_t start);
PL_EXPORT long pl_barrier_collect(uintptr_t start, uint64_t *out);
PL_EXPORT uint64_t pl_barrier_faults(void);

static struct region *find(uintptr_t addr)
{
	int low = 0, high = atomic_load(&n_regions);
	while (low < high) {
		int middle = (low + high) / 2;
		struct region *r = &regions[middle];
		if (addr < r->start)
			high = middle;
		else if (addr >= r->start + (r->pages << PAGE_BITS))
			low = middle + 1;
		else
			return r;
	}
	return NULL;
}

/* 1: handled. */
static int ours(uintptr_t addr)
{
	int handled = 0;
	for (;;) { /* the table is about to change: wait outside */
		atomic_fetch_add(&users, 1);
		if (!atomic_load(&changing))
			break;
		atomic_fetch_sub(&users, 1);
		syscall(SYS_sched_yield);
	}
	struct region *r = find(addr);
	if (r) {
		size_t page = (addr - r->start) >> PAGE_BITS;
		uint64_t bit = UINT64_C(1) << (page % 64);
		if (!(atomic_fetch_or(&r->dirty[page / 64], bit) & bit)) {
			uintptr_t at = addr & ~(((uintptr_t)1 << PAGE_BITS) - 1);
			handled = syscall(SYS_mprotect, at, (size_t)1 << PAGE_BITS, r->prot) == 0;
			atomic_fetch_add(&caught, 1);
			retries = 0;
		} else if (last_addr != addr || ++retries < MAX_RETRIES) {
			if (last_addr != addr)
				retries = 0;
			handled = 1;
		}
		last_addr = addr;
	}
	atomic_fetch_sub(&users, 1);
	return handled;
}

static void pass_on(int sig, siginfo_t *info, void *context)
{
	if (before.sa_flags & SA_SIGINFO || (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)) {
		sigset_t old, mask = before.sa_mask;
		if (!(before.sa_flags & SA_NODEFER))
			sigaddset(&mask, sig);
		else
			sigdelset(&mask, sig);
		pthread_sigmask(SIG_BLOCK, &mask, &old);
		struct sigaction handler = before;
		if (before.sa_flags & (int)SA_RESETHAND)
			before.sa_handler = SIG_DFL, before.sa_flags = 0;
		if (handler.sa_flags & SA_SIGINFO)
			handler.sa_sigaction(sig, info, context);
		else
			handler.sa_handler(sig);
		pthread_sigmask(SIG_SETMASK, &old, NULL);
		return;
	}
	if (before.sa_handler == SIG_IGN && info->si_code <= 0)
		return; /* sent by kill(2), and ignored */
	struct sigaction fall = {.sa_handler = SIG_DFL};
	sigaction(sig, &fall, NULL);
	if (info->si_code <= 0)
		syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), sig);
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	/* SEGV_ACCERR: mapped, and the access is not allowed */
	int handled = info->si_code == SEGV_ACCERR && ours((uintptr_t)info->si_addr);
	if (!handled)
		pass_on(sig, info, context);
	errno = saved;
}

/* No handler is between its bit and its mprotect while the table or the bits change; a fault in this thread
 * would wait for itself, so nothing that is watched may be written here, and no signal handler may run. */
static void keep_out(sigset_t *old)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, old);
	atomic_store(&changing, 1);
	while (atomic_load(&users))
		syscall(SYS_sched_yield);
}

static void let_in(const sigset_t *old)
{
	atomic_store(&changing, 0);
	pthread_sigmask(SIG_SETMASK, old, NULL);
}

static void in_child(void)
{
	atomic_store(&changing, 0);
	atomic_store(&users, 0);
}

/* Our handler in front of whatever is there now. 0, or -errno. Also puts it back in front after the program
 * installed another. */
PL_EXPORT int pl_barrier_install(void)
{
	struct sigaction mine = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER}, old;
	if (sigaction(SIGSEGV, NULL, &old))
		return -errno;
	if ((old.sa_flags & SA_SIGINFO) && old.sa_sigaction == on_fault)
		return 0;
	before = old;
	static atomic_int once;
	if (!atomic_exchange(&once, 1))
		pthread_atfork(NULL, NULL, in_child);
	if (sigaction(SIGSEGV, &mine, NULL))
		return -errno;
	atomic_store(&installed, 1);
	return 0;
}

PL_EXPORT int pl_barrier_is_ours(void)
{
	struct sigaction now;
	return !sigaction(SIGSEGV, NULL, &now) && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault;
}

/* The program's handler back in its place. */
PL_EXPORT void pl_barrier_remove(void)
{
	if (pl_barrier_is_ours())
		sigaction(SIGSEGV, &before, NULL);
	atomic_store(&installed, 0);
}

/* bitmap: (pages + 63) / 64 words, zero, kept by the caller until `drop`. -EEXIST where it overlaps. */
PL_EXPORT int pl_barrier_add(uintptr_t start, size_t pages, int prot, uint64_t *bitmap)
{
	sigset_t old;
	int n = atomic_load(&n_regions), at = 0;
	if (n == MAX_REGIONS)
		return -ENOSPC;
	while (at < n && regions[at].start < start)
		at++;
	if ((at < n && start + (pages << PAGE_BITS) > regions[at].start) ||
	    (at && regions[at - 1].start + (regions[at - 1].pages << PAGE_BITS) > start))
		return -EEXIST;
	keep_out(&old);
	memmove(&regions[at + 1], &regions[at], (size_t)(n - at) * sizeof(regions[0]));
	regions[at] = (struct region){start, pages, prot, (_Atomic uint64_t *)bitmap};
	atomic_store(&n_regions, n + 1);
	let_in(&old);
	return 0;
}

/* Makes the region writable again and forgets it. */
PL_EXPORT int pl_barrier_drop(uintptr_t start)
{
	struct region *r = find(start);
	if (!r || r->start != start)
		return -ENOENT;
	int failed = mprotect((void *)start, r->pages << PAGE_BITS, r->prot) ? -errno : 0;
	sigset_t old;
	keep_out(&old);
	int n = atomic_load(&n_regions), at = (int)(r - regions);
	memmove(&regions[at], &regions[at + 1], (size_t)(n - at - 1) * sizeof(regions[0]));
	atomic_store(&n_regions, n - 1);
	let_in(&old);
	return failed;
}

/* Protect the whole region: one call, so that its vma stays one. */
PL_EXPORT int pl_barrier_protect(uintptr_t start)
{
	struct region *r = find(start);
	if (!r || r->start != start)
		return -ENOENT;
	return mprotect((void *)start, r->pages << PAGE_BITS, r->prot & ~PROT_WRITE) ? -errno : 0;
}

static long take(struct region *r, uintptr_t start, uint64_t *out)
{
	size_t words = (r->pages + 63) / 64, run = 0, first = 0;
	long total = 0;
	memset(out, 0, words * 8);
	for (size_t page = 0; page <= r->pages; page++) {
		if (page < r->pages && page % 64 == 0 && !run && !atomic_load(&r->dirty[page / 64])) {
			page += 63;
			continue;
		}
		int set = page < r->pages && (atomic_load(&r->dirty[page / 64]) >> (page % 64) & 1);
		if (set) {
			if (!run)
				first = page;
			run++;
			continue;
		}
		if (!run)
			continue;
		for (size_t p = first; p < first + run; p++)
			out[p / 64] |= UINT64_C(1) << (p % 64);
		if (mprotect((void *)(start + (first << PAGE_BITS)), run << PAGE_BITS, r->prot & ~PROT_WRITE))
			return -errno;
		for (size_t p = first; p < first + run; p++)
			atomic_fetch_and(&r->dirty[p / 64], ~(UINT64_C(1) << (p % 64)));
		total += (long)run;
		run = 0;
	}
	return total;
}

/* Takes the region's bits into `out` and protects those pages again; returns how many. `out` must not be
 * watched. Handlers wait meanwhile, so no page can be open with its bit clear. */
PL_EXPORT long pl_barrier_collect(uintptr_t start, uint64_t *out)
{
	struct region *r = find(start);
	if (!r || r->start != start)
		return -ENOENT;
	sigset_t old;
	keep_out(&old);
	long total = take(r, start, out);
	let_in(&old);
	return total;
}

PL_EXPORT uint64_t pl_barrier_faults(void) { return atomic_load(&caught); }
