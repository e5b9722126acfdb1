/* What causes_tree.c does to memory; each keeps the shadows of all processes right. */
#ifndef CAUSES_TREE_OPS_H
#define CAUSES_TREE_OPS_H
#include "causes_tree.h"

static void op_map(void)
{
	struct reg *r = freeslot();
	if (!r)
		return;
	memset(r, 0, sizeof *r);
	int k = rnd(10);
	k = k >= 7 ? (int)rnd(2) : k;
	if (k == THP && rnd(2))
		k = ANON;
	r->kind = k;
	r->prot = PROT_READ | PROT_WRITE;
	r->file = 1 + rnd(NF - 1);
	int pop = !rnd(12) && k != THP;
	if (k == THP) {
		char *raw = mmap(NULL, 2 * HUGE, r->prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		r->raw = raw;
		r->rawlen = 2 * HUGE;
		r->a = (char *)(((uintptr_t)raw + HUGE - 1) & ~(HUGE - 1));
		r->n = 512;
		madvise(r->a, HUGE, MADV_HUGEPAGE);
	} else {
		r->n = 4 + rnd(28);
		r->off = isfile(k) ? rnd(FP - r->n) : 0;
		int fl =
		    (priv(k) ? MAP_PRIVATE : MAP_SHARED) | (isfile(k) ? 0 : MAP_ANONYMOUS) | (pop ? MAP_POPULATE : 0);
		int fd = k == PFILE || k == SFILE ? files[r->file] : isfile(k) ? mem[r->file] : -1;
		/* among PROT_NONE, so that nothing merges by chance half of the time */
		if (rnd(2)) {
			char *raw = mmap(NULL, (r->n + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			r->a = mmap(raw + PAGE, r->n * PAGE, r->prot, fl | MAP_FIXED, fd, r->off * PAGE);
		} else
			r->a = mmap(NULL, r->n * PAGE, r->prot, fl, fd, r->off * PAGE);
		if (r->a == MAP_FAILED)
			die("mmap");
	}
	fresh(r, 0, r->n);
	if (pop)
		populated(r, 0, r->n, 1);
}
static void op_unmap(void)
{
	struct reg *r = pick(me);
	if (!r)
		return;
	if (r->raw)
		munmap(r->raw, r->rawlen);
	else
		munmap(r->a, r->n * PAGE);
	r->a = NULL;
}
static void range(struct reg *r, int *lo, int *hi)
{
	*lo = rnd(r->n);
	*hi = *lo + 1 + rnd(r->n - *lo);
	if (!rnd(3))
		*lo = 0, *hi = r->n;
}
static void op_dontneed(void)
{
	struct reg *r = pick(me);
	int lo, hi;
	u64 e[NP];
	if (!r)
		return;
	range(r, &lo, &hi);
	for (int i = lo; i < hi; i++)
		e[i] = entry(pm, r->a + i * PAGE);
	if (madvise(r->a + lo * PAGE, (hi - lo) * PAGE, MADV_DONTNEED)) {
		if (!r->locked)
			die("dontneed");
		return;
	}
	for (int i = lo; i < hi; i++) {
		struct pg *p = &r->p[i];
		if (PRES(e[i]))
			p->dropped = 1;
		p->own = p->ro = p->wr = 0;
	}
}
static void op_free(void)
{
	struct reg *r = pick(me);
	int lo, hi;
	if (!r || r->kind != ANON || r->locked)
		return;
	range(r, &lo, &hi);
	madvise(r->a + lo * PAGE, (hi - lo) * PAGE, MADV_FREE);
	/* no pressure: nothing goes */
}
static void op_pageout(void)
{
	struct reg *r = pick(me);
	int lo, hi;
	u64 e[NP];
	if (!r || r->kind == THP)
		return;
	range(r, &lo, &hi);
	for (int i = lo; i < hi; i++)
		e[i] = entry(pm, r->a + i * PAGE);
	madvise(r->a + lo * PAGE, (hi - lo) * PAGE, 21);
	for (int i = lo; i < hi; i++)
		if (PRES(e[i]) && !PRES(entry(pm, r->a + i * PAGE))) {
			r->p[i].dropped = 4;
			r->p[i].own = 0;
			r->p[i].wr = 0;
		} else if (PRES(e[i]) && r->kind == SFILE)
			r->p[i].wr = 2;
}
static void op_prot(void)
{
	struct reg *r = pick(me);
	if (!r)
		return;
	int to = r->prot != 3 ? 3 : rnd(3) == 0 ? PROT_NONE : PROT_READ;
	if (mprotect(r->a, r->n * PAGE, to)) {
		if (errno == ENOMEM || errno == EAGAIN)
			return;
		die("mprotect");
	}
	int gains = (to & PROT_WRITE) && !(r->prot & PROT_WRITE);
	r->prot = to;
	if (gains && r->locked && priv(r->kind))
		populated(r, 0, r->n, 1);
}
static void op_lock(void)
{
	struct reg *r = pick(me);
	if (!r || r->kind == THP)
		return;
	if (r->locked) {
		munlock(r->a, r->n * PAGE);
		r->locked = 0;
		return;
	}
	if (r->prot == PROT_NONE)
		return;
	if (mlock(r->a, r->n * PAGE))
		return;
	r->locked = 1;
	populated(r, 0, r->n, (r->prot & PROT_WRITE) && priv(r->kind));
}
static void op_populate(void)
{
	struct reg *r = pick(me);
	int lo, hi, w = rnd(2);
	if (!r || r->kind == THP)
		return;
	range(r, &lo, &hi);
	if (madvise(r->a + lo * PAGE, (hi - lo) * PAGE, w ? 23 : 22))
		return;
	populated(r, lo, hi, w);
	if (w && r->kind == SFILE)
		for (int i = lo; i < hi; i++)
			r->p[i].wr = 1;
}
static void op_move(void)
{
	struct reg *r = pick(me);
	int lo, hi;
	if (!r || r->kind == THP)
		return;
	int mode = rnd(4);
	if (mode == 0) { /* all of it, elsewhere */
		char *to = mmap(NULL, r->n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *q = mremap(r->a, r->n * PAGE, r->n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		if (q == MAP_FAILED)
			die("mremap");
		r->a = q;
	} else if (mode == 1) { /* DONTUNMAP, a part */
		struct reg *s = freeslot();
		if (!s || (r->kind != ANON && r->kind != SHM))
			return;
		range(r, &lo, &hi);
		char *to = mmap(NULL, (hi - lo) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *q = mremap(r->a + lo * PAGE, (hi - lo) * PAGE, (hi - lo) * PAGE,
				 MREMAP_MAYMOVE | MREMAP_FIXED | 4, to);
		if (q == MAP_FAILED) {
			munmap(to, (hi - lo) * PAGE);
			return;
		}
		*s = *r;
		s->a = q;
		s->n = hi - lo;
		s->raw = NULL;
		memcpy(s->p, r->p + lo, (hi - lo) * sizeof(struct pg));
		fresh(r, lo, hi);
		r->locked = 0;		    /* dontunmap_complete clears it of the whole vma */
	} else if (mode == 2 && r->n > 4) { /* shrink */
		int n = 2 + rnd(r->n - 2);
		if (mremap(r->a, r->n * PAGE, n * PAGE, 0) == MAP_FAILED)
			die("shrink");
		r->n = n;
	} else if (mode == 3 && r->kind == ANON && r->n < 40) {
		int n = r->n + 1 + rnd(8);
		char *q = mremap(r->a, r->n * PAGE, n * PAGE, MREMAP_MAYMOVE);
		if (q == MAP_FAILED)
			return;
		r->a = q;
		fresh(r, r->n, n);
		int from = r->n;
		r->n = n;
		if (r->locked && (r->prot & PROT_WRITE))
			populated(r, from, n, 1);
		else if (r->locked)
			populated(r, from, n, 0);
	}
}
static void op_file(void)
{
	int f = 1 + rnd(NF - 1),
	    mode = everything ? rnd(5)
		   : rnd(2)   ? 0
			      : 3,
	    memfd = rnd(2), k = rnd(FP), k2 = k + 1 + rnd(FP - k);
	int fd = memfd ? mem[f] : files[f];
	if (memfd && (mode == 1 || mode == 2))
		mode = 0;
	if (mode == 2)
		k = 0;
	int lo = k, hi = mode == 3 || mode == 4 ? k2 : FP, copies = mode < 3;
	/* who has what */
	static __thread u8 there[NPROC][NR][NP];
	for (int q = 0; q < NPROC; q++)
		if (S->pr[q].live) {
			int fdq = pagemap_of(S->pr[q].pid);
			for (int x = 0; x < NR; x++) {
				struct reg *r = &S->pr[q].r[x];
				if (!r->a || !isfile(r->kind) || r->file != f ||
				    (r->kind == SMEMFD || r->kind == PMEMFD) != memfd)
					continue;
				for (int i = 0; i < r->n; i++) {
					u64 e = entry(fdq, r->a + i * PAGE);
					there[q][x][i] = PRES(e) ? (FILEP(e) ? 1 : 2) : 0;
				}
			}
			close(fdq);
		}
	int res = 0;
	if (mode == 0) {
		res = ftruncate(fd, k * PAGE);
		res |= ftruncate(fd, FP * PAGE);
	} else if (mode == 1) {
		res = truncate(fname[f], k * PAGE);
		res |= truncate(fname[f], FP * PAGE);
	} else if (mode == 2) {
		int t = open(fname[f], O_RDWR | O_TRUNC);
		if (t < 0)
			die("O_TRUNC");
		close(t);
		res = truncate(fname[f], FP * PAGE);
	} else if (mode == 3) {
		res = fallocate(fd, 3, k * PAGE, (k2 - k) * PAGE);
	} else {
		res = fallocate(fd, 3, k * PAGE, (k2 - k) * PAGE);
	}
	if (res)
		die("truncate");
	char buf[PAGE];
	memset(buf, 5, PAGE);
	for (int i = lo; i < hi; i++)
		if (pwrite(fd, buf, PAGE, i * PAGE) != PAGE)
			die("pwrite");
	for (int q = 0; q < NPROC; q++)
		if (S->pr[q].live)
			for (int x = 0; x < NR; x++) {
				struct reg *r = &S->pr[q].r[x];
				if (!r->a || !isfile(r->kind) || r->file != f ||
				    (r->kind == SMEMFD || r->kind == PMEMFD) != memfd)
					continue;
				for (int i = 0; i < r->n; i++) {
					int o = r->off + i;
					struct pg *p = &r->p[i];
					if (o < lo || o >= hi)
						continue;
					if (there[q][x][i] == 2 && !copies)
						continue;
					if (there[q][x][i])
						p->dropped = 2;
					else if (p->dropped)
						p->dropped = 3;
					p->how = mode;
					p->own = p->ro = p->wr = 0;
				}
			}
}
static void op_remote(void)
{
	struct proc *q = &S->pr[rnd(NPROC)];
	struct reg *r;
	int lo, n, w = rnd(2);
	if (!q->live)
		return;
	r = pick(q);
	if (!r || r->kind == THP)
		return;
	lo = rnd(r->n);
	n = 1 + rnd(3);
	if (lo + n > r->n)
		n = r->n - lo;
	int fdq = pagemap_of(q->pid);
	u64 e[4];
	for (int i = 0; i < n; i++)
		e[i] = entry(fdq, r->a + (lo + i) * PAGE);
	static char buf[4 * PAGE];
	struct iovec l = {buf, n * PAGE}, m = {r->a + lo * PAGE, n * PAGE};
	ssize_t got = (w ? process_vm_writev : process_vm_readv)(q->pid, &l, 1, &m, 1, 0);
	for (int i = 0; i < n; i++) {
		struct pg *p = &r->p[lo + i];
		u64 a = entry(fdq, r->a + (lo + i) * PAGE);
		if (got < (ssize_t)((i + 1) * PAGE))
			continue;
		if (PRES(a))
			p->dropped = 0;
		if (w) {
			if (priv(r->kind))
				p->own = 1, p->ro = 0;
			p->wr = r->kind == SFILE ? 1 : p->wr;
		} else if (priv(r->kind) && PRES(e[i]) && !FILEP(e[i]) && PFN(e[i]) != zero_pfn && !EXCL(e[i]) &&
			   EXCL(a)) {
			p->own = 1;
			p->ro = 1;
		}
	}
	close(fdq);
}

struct uh {
	int fd;
	int wp;
	char *page;
};
static void *uh(void *x)
{
	struct uh *u = x;
	struct uffd_msg m;
	if (read(u->fd, &m, sizeof m) != sizeof m)
		return NULL;
	u64 at = m.arg.pagefault.address & ~(PAGE - 1);
	if (u->wp) {
		struct uffdio_writeprotect w = {.range = {at, PAGE}};
		ioctl(u->fd, UFFDIO_WRITEPROTECT, &w);
	} else if (u->page) {
		struct uffdio_copy c = {.dst = at, .src = (u64)u->page, .len = PAGE};
		ioctl(u->fd, UFFDIO_COPY, &c);
	} else {
		struct uffdio_zeropage z = {.range = {at, PAGE}};
		ioctl(u->fd, UFFDIO_ZEROPAGE, &z);
	}
	return NULL;
}
static void op_uffd(void)
{
	struct reg *r = pick(me);
	if (!r || r->kind != ANON || r->locked || r->prot != 3)
		return;
	struct uffdio_api api = {.api = UFFD_API};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (fd < 0)
		die("userfaultfd");
	if (ioctl(fd, UFFDIO_API, &api))
		die("api");
	int i = rnd(r->n), w = rnd(2);
	char *a = r->a + i * PAGE;
	u64 e = entry(pm, a);
	int wp = PRES(e) && !FILEP(e);
	if (wp)
		w = 1;
	if (wp && (!EXCL(e) || PFN(e) == zero_pfn || r->p[i].own != 1 || r->p[i].ro)) {
		close(fd);
		return;
	}
	struct uffdio_register reg = {.range = {(u64)r->a, r->n * PAGE},
				      .mode = wp ? UFFDIO_REGISTER_MODE_WP : UFFDIO_REGISTER_MODE_MISSING};
	if (ioctl(fd, UFFDIO_REGISTER, &reg))
		die("register");
	char *src = aligned_alloc(PAGE, PAGE);
	memset(src, 3, PAGE);
	struct uh u = {fd, wp, rnd(3) ? src : NULL};
	if (wp) {
		struct uffdio_writeprotect pr = {.range = {(u64)a, PAGE}, .mode = 1};
		if (ioctl(fd, UFFDIO_WRITEPROTECT, &pr))
			die("wp");
	}
	pthread_t t;
	if (pthread_create(&t, NULL, uh, &u))
		die("thr");
	u64 b = now();
	if (w)
		*(volatile char *)a = 1;
	else
		(void)*(volatile char *)a;
	/* a write over UFFDIO_ZEROPAGE faults twice: once for the handler, once over the zero page */
	logit(b, a, "userfaultfd", w && !u.page && !wp ? -1 : 1, 0, w, "uffd");
	pthread_join(t, NULL);
	close(fd);
	free(src);
	r->p[i].dropped = 0;
	if (w || u.page) {
		r->p[i].own = 1;
		r->p[i].ro = 0;
	}
}
static void op_sync(void)
{
	struct reg *r = pick(me);
	if (!r || r->kind != SFILE)
		return;
	if (msync(r->a, r->n * PAGE, MS_SYNC))
		die("msync");
	/* cleans the pages of the file, in all mappings */
	for (int q = 0; q < NPROC; q++)
		if (S->pr[q].live)
			for (int x = 0; x < NR; x++) {
				struct reg *s = &S->pr[q].r[x];
				if (s->a && s->kind == SFILE && s->file == r->file)
					for (int i = 0; i < s->n; i++) {
						int o = s->off + i;
						if (o >= r->off && o < r->off + r->n && s->p[i].wr)
							s->p[i].wr = 2;
					}
			}
}
static void op_remove(void)
{
	struct reg *r = pick(me);
	int lo, hi;
	u64 e;
	if (!r || r->kind != SMEMFD || r->locked || !(r->prot & PROT_WRITE))
		return;
	range(r, &lo, &hi);
	static __thread u8 there[NPROC][NR][NP];
	for (int q = 0; q < NPROC; q++)
		if (S->pr[q].live) {
			int fdq = pagemap_of(S->pr[q].pid);
			for (int x = 0; x < NR; x++) {
				struct reg *s = &S->pr[q].r[x];
				if (!s->a || (s->kind != SMEMFD && s->kind != PMEMFD) || s->file != r->file)
					continue;
				for (int i = 0; i < s->n; i++) {
					e = entry(fdq, s->a + i * PAGE);
					there[q][x][i] = PRES(e) ? FILEP(e) ? 1 : 2 : 0;
				}
			}
			close(fdq);
		}
	if (madvise(r->a + lo * PAGE, (hi - lo) * PAGE, MADV_REMOVE))
		return;
	for (int q = 0; q < NPROC; q++)
		if (S->pr[q].live)
			for (int x = 0; x < NR; x++) {
				struct reg *s = &S->pr[q].r[x];
				if (!s->a || (s->kind != SMEMFD && s->kind != PMEMFD) || s->file != r->file)
					continue;
				for (int i = 0; i < s->n; i++) {
					int o = s->off + i;
					if (o < r->off + lo || o >= r->off + hi || there[q][x][i] == 2)
						continue;
					if (there[q][x][i] || s->p[i].dropped)
						s->p[i].dropped = 3;
					s->p[i].wr = 0;
				}
			}
}
#endif
