/* The world of causes_tree.c: processes, their ranges, a shadow of each page, and the truth of an access. */
#ifndef CAUSES_TREE_H
#define CAUSES_TREE_H
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
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
typedef unsigned char u8;
typedef uint64_t u64;
#define PAGE 4096UL
#define HUGE (2UL << 20)
#define NP 512
#define NR 10
#define NPROC 14
#define NF 6
#define FP 64
#define MAXLOG 100000
enum { ANON, PFILE, SFILE, SHM, SMEMFD, PMEMFD, THP, NKIND };
static const char *kn[] = {"anon", "pfile", "sfile", "shm", "smemfd", "pmemfd", "thp"};
struct pg {
	u8 own;		/* 1: written by this process since it got it, 2: by an ancestor */
	u8 dropped;	/* was mapped until 1: MADV_DONTNEED, 2: a cut of the file, 3: either, 4: MADV_PAGEOUT */
	u8 ro;		/* its own, yet write-protected by a fork; 2: perhaps */
	u8 wr;		/* shared file: written since it was clean; 2: written back since, perhaps */
	u8 how;		/* how its file was cut, for the log */
	int id;		/* of the page at its first life: its lock */
};
struct reg {
	char *a;
	int n, kind, file, off, prot, locked, wipe, dontfork;
	char *raw;
	size_t rawlen;
	struct pg p[NP];
};
struct proc {
	int live, pid, nchild, parent;
	struct reg r[NR];
};
struct ent {
	int tid, faults;
	u64 before, after, addr;
	char kern;
	char w;
	char cause[64];
	char ctx[64];
};
/* In memory of all processes. g: written by whoever changes mappings; pl: by whoever touches the page. */
struct sh {
	atomic_int used, target, exiting, nextid, nops;
	pthread_rwlock_t g;
	pthread_mutex_t pl[1024];
	struct proc pr[NPROC];
	struct ent log[MAXLOG];
};
static struct sh *S;
static struct proc *me;
static int kpc = -1, pm = -1;
static u64 zero_pfn;
static __thread u64 rng;
static __thread sigjmp_buf jb;
static __thread int is_main;
static int files[NF], mem[NF];
static char fname[NF][256];
static char *stack_low;
static int everything;

static u64 now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}
static u64 rnd(u64 n)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return (rng >> 11) % n;
}
static void die(const char *w)
{
	fprintf(stderr, "oracle: %s: %s\n", w, strerror(errno));
	kill(0, SIGKILL);
	_exit(3);
}
static int pagemap_of(int pid)
{
	char path[64];
	sprintf(path, "/proc/%d/pagemap", pid);
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		die(path);
	return fd;
}
static u64 entry(int fd, void *a)
{
	u64 e = 0;
	if (pread(fd, &e, 8, (u64)a / PAGE * 8) != 8)
		die("pagemap");
	return e;
}
static u64 count_of(u64 pfn)
{
	u64 c = 0;
	if (pread(kpc, &c, 8, pfn * 8) != 8)
		die("kpagecount");
	return c;
}
#define PRES(e) ((e) >> 63)
#define PFN(e) ((e) & ((1ULL << 55) - 1))
#define FILEP(e) (((e) >> 61) & 1)
#define EXCL(e) (((e) >> 56) & 1)
static void on_sig(int s)
{
	(void)s;
	siglongjmp(jb, 1);
}
static int priv(int k)
{
	return k == ANON || k == PFILE || k == PMEMFD || k == THP;
}
static int anon_like(int k)
{
	return k == ANON || k == THP;
}
static int isfile(int k)
{
	return k == PFILE || k == SFILE || k == SMEMFD || k == PMEMFD;
}

static void logit(u64 b, void *a, const char *cause, int faults, int kern, int w, const char *ctx)
{
	u64 after = now();
	int i = atomic_fetch_add(&S->used, 1);
	if (i >= MAXLOG)
		die("log");
	struct ent *e = &S->log[i];
	e->tid = syscall(SYS_gettid);
	e->faults = faults;
	e->before = b;
	e->after = after;
	e->addr = (u64)a;
	e->kern = kern;
	e->w = w;
	snprintf(e->cause, sizeof e->cause, "%s", cause);
	snprintf(e->ctx, sizeof e->ctx, "%s", ctx);
}

/* the truth of an access that is to come */
static int truth(struct reg *r, int i, int w, char *out, char *ctx, u64 e)
{
	struct pg *p = &r->p[i];
	int k = r->kind, f = 1;
	sprintf(ctx, "%s:own%d:how%d:drop%d:ro%d:e%x:lk%d", kn[k], p->own, p->how, p->dropped, p->ro, (int)(e >> 55),
		r->locked);
	if (!(r->prot & PROT_READ) || (w && !(r->prot & PROT_WRITE))) {
		strcpy(out, "invalid-permission");
		return 1;
	}
	if (!PRES(e)) {
		if (p->dropped == 1)
			strcpy(out, "after-dontneed");
		else if (p->dropped == 2)
			strcpy(out, "after-truncate");
		else if (p->dropped == 3)
			strcpy(out, "after-dontneed|after-truncate");
		else if (p->dropped == 4)
			strcpy(out, "after-pageout");
		else if (anon_like(k))
			strcpy(out, w ? "first-write" : "first-read");
		else if (k == SHM || k == SMEMFD)
			strcpy(out, "shared-page");
		else if (k == SFILE)
			strcpy(out, "file-page-cached|file-page-disk");
		else
			strcpy(out, w ? "file-cow" : "file-page-cached|file-page-disk");
		if (p->own && !p->dropped)
			strcat(out, "|unmapped-by-kernel");
		return 1;
	}
	if (!w) {
		strcpy(out, "none");
		return 0;
	}
	if (k == SFILE) {
		if (p->wr) {
			strcpy(out, "none");
			return -2;
		}
		strcpy(out, "write-notify");
		return 1;
	}
	if (!priv(k)) {
		strcpy(out, "none");
		return 0;
	}
	if (FILEP(e) && k == THP) {
		strcpy(out, "zero-page-write");
		return 1;
	}
	if (FILEP(e)) {
		strcpy(out, "file-cow");
		return 1;
	}
	if (PFN(e) == zero_pfn) {
		strcpy(out, "zero-page-write");
		return 1;
	}
	if (p->own == 1 && !p->ro) {
		strcpy(out, "none");
		return 0;
	}
	if (p->ro == 2) {
		strcpy(out, "none");
		return -2;
	} /* whether all of the block was reused, or this page alone */
	u64 c = count_of(PFN(e));
	if (c >= 2) {
		strcpy(out, p->own == 1 ? "fork-cow-parent" : "fork-cow-child");
		if (atomic_load(&S->exiting))
			strcat(out, "|sharers-gone");
	} else
		strcpy(out, "sharers-gone");
	sprintf(ctx + strlen(ctx), ":c%d", (int)c);
	return f;
}

static void touch(struct reg *r, int i, int w, int kern)
{
	char t[128], ctx[128];
	char *a = r->a + i * PAGE;
	struct pg *p = &r->p[i];
	int id = r->kind == THP ? r->p[0].id : p->id;	/* a write over the huge zero page is of all the block */
	if (id)
		pthread_mutex_lock(&S->pl[id & 1023]);
	u64 e = entry(pm, a);
	int f = truth(r, i, w, t, ctx, e);
	if (!strcmp(t, "none") && rnd(8)) {
		if (id)
			pthread_mutex_unlock(&S->pl[id & 1023]);
		return;
	}
	u64 b = now();
	int failed = 0;
	if (kern && f >= 0) {
		int fd = files[0];
		ssize_t got;
		if (w)
			got = pread(fd, a + 8 + rnd(1000), 16, 0);
		else {
			int pp[2];
			if (pipe(pp))
				die("pipe");
			b = now();
			got = write(pp[1], a + 5, 9);
			close(pp[0]);
			close(pp[1]);
		}
		failed = got < 0;
	} else if (!sigsetjmp(jb, 1)) {
		if (w)
			*(volatile char *)(a + rnd(PAGE)) = (char)b | 1;
		else
			(void)*(volatile char *)(a + rnd(PAGE));
	} else
		failed = 1;
	int isinv = !strcmp(t, "invalid-permission");
	if (failed != isinv) {
		if (failed && isfile(r->kind))
			strcpy(t, "invalid-end-of-file");
		else {
			fprintf(stderr, "%s %s %d\n", t, ctx, kern);
			die("unexpected failure");
		}
	}
	u64 e2 = entry(pm, a);
	if (r->kind == THP && !PRES(e) && (i ^ 1) < r->n) {
		/* huge: the neighbour came too */
		int j = i ^ 1;
		u64 n = entry(pm, r->a + j * PAGE);
		if (PRES(n) && (PFN(n) ^ 1) == PFN(e2) && strcmp(t, "after-dontneed"))
			strcpy(t, "huge-page");
		else if (PRES(n) && (PFN(n) ^ 1) == PFN(e2))
			strcpy(t, "huge-page|after-dontneed");
		if (PRES(n)) { /* all pages of the block */
			for (int x = 0; x < r->n; x++)
				if (PRES(entry(pm, r->a + x * PAGE))) {
					r->p[x].dropped = 0;
					if (w && (strstr(t, "huge")))
						r->p[x].own = 1;
				}
		}
	}
	if (!strncmp(t, "sharers-gone", 12) || strstr(t, "|sharers-gone"))
		strcat(ctx, PFN(e) == PFN(e2) ? ":reused" : ":copied");
	logit(b, a, t, f == -2 ? -1 : f, kern && f >= 0, w, ctx);
	if (!failed && w && r->kind == THP && strcmp(t, "none")) {
		u64 n = entry(pm, r->a + (i ^ 1) * PAGE);
		if (PRES(n) && (PFN(n) ^ 1) == PFN(e2))
			for (int x = 0; x < r->n; x++) {
				u64 y = entry(pm, r->a + x * PAGE);
				if (PRES(y) && PFN(y) - x == PFN(e2) - i) {
					if (!r->p[x].own)
						r->p[x].own = 1;
					if (r->p[x].ro && x != i)
						r->p[x].ro = 2;
					r->p[x].dropped = 0;
				}
			}
	}
	if (!failed) {
		if (w) {
			if (priv(r->kind))
				p->own = 1;
			p->ro = 0;
			p->wr = 1;
		}
		p->dropped = 0;
		p->how = 0;
	}
	if (id)
		pthread_mutex_unlock(&S->pl[id & 1023]);
}

static struct reg *pick(struct proc *q)
{
	for (int t = 0; t < 30; t++) {
		struct reg *r = &q->r[rnd(NR)];
		if (r->a)
			return r;
	}
	return NULL;
}
static struct reg *freeslot(void)
{
	for (int i = 0; i < NR; i++)
		if (!me->r[i].a)
			return &me->r[i];
	return NULL;
}
static void fresh(struct reg *r, int from, int to)
{
	for (int i = from; i < to; i++) {
		memset(&r->p[i], 0, sizeof r->p[i]);
		r->p[i].id = 1 + atomic_fetch_add(&S->nextid, 1);
	}
}
static void populated(struct reg *r, int from, int to, int w)
{
	for (int i = from; i < to; i++) {
		if (!PRES(entry(pm, r->a + i * PAGE)))
			continue;
		r->p[i].dropped = 0;
		if (w && priv(r->kind)) {
			r->p[i].own = 1;
			r->p[i].ro = 0;
			r->p[i].wr = 1;
		}
	}
}
#endif
