/* A tree of processes and threads that take page faults whose cause is decided by what the kernel shows: before each
 * access the entry of the page in pagemap and, where it is shared, kpagecount; after it, whether the frame is
 * another. What pagemap does not show (who had dropped a page, whether it was one's own) stands in a shadow beside
 * each page. Independent of causes_oracle.c: nothing is decided by construction alone, and ranges of all kinds meet
 * all calls.
 *
 * usage: causes_tree LOG FILE SEED ACCESSES [all]   (root; FILE: prefix of files that are made and removed)
 * all: also truncate by path, O_TRUNC and process_vm_readv/writev, whose ranges no recording has yet.
 * One line of LOG for each access:
 *   tid before_ns after_ns address causes faults in_kernel write context
 * causes: by | what it may have been (a sharer was ending just then); faults: -1 where either is right.
 */
#include "causes_tree_ops.h"

static void work(u64 seed, int ops);
static void *thread(void *a)
{
	work((u64)a, 40 + (u64)a % 60);
	return NULL;
}
static void leave(void)
{
	int st;
	/* children first */
	for (;;) {
		pid_t p = wait(&st);
		if (p < 0)
			break;
		if (st) {
			fprintf(stderr, "child %d ended %x\n", p, st);
			die("child");
		}
		atomic_fetch_sub(&S->exiting, 1);
	}
	pthread_rwlock_wrlock(&S->g);
	me->live = 0;
	atomic_fetch_add(&S->exiting, 1);
	pthread_rwlock_unlock(&S->g);
	_exit(0);
}
static void run_process(u64 seed, int ops)
{
	pthread_t t;
	int two = rnd(2);
	if (two && pthread_create(&t, NULL, thread, (void *)(seed * 7 + 1)))
		die("thread");
	work(seed, ops);
	if (two)
		pthread_join(t, NULL);
	leave();
}
static void protect(void)
{
	for (int x = 0; x < NR; x++) {
		struct reg *r = &me->r[x];
		if (r->a && !r->dontfork && !r->wipe && priv(r->kind))
			for (int i = 0; i < r->n; i++)
				if (r->p[i].own)
					r->p[i].ro = 1;
	}
}
static void op_fork(void)
{
	int slot = -1, live = 0;
	for (int i = 0; i < NPROC; i++) {
		if (S->pr[i].live)
			live++;
		else
			slot = i;
	}
	if (slot < 0 || live > 8)
		return;
	struct proc *c = &S->pr[slot];
	memcpy(c->r, me->r, sizeof c->r);
	for (int x = 0; x < NR; x++) {
		struct reg *r = &c->r[x];
		if (!r->a)
			continue;
		if (r->dontfork) {
			r->a = NULL;
			continue;
		}
		r->locked = 0;
		for (int i = 0; i < r->n; i++) {
			struct pg *p = &r->p[i];
			if (r->wipe || !priv(r->kind)) {
				int id = p->id;
				memset(p, 0, sizeof *p);
				p->id = id;
			} else {
				if (p->own == 1)
					p->own = 2;
				p->ro = p->own != 0;
			}
		}
	}
	u64 seed = rng * 0x9e3779b97f4a7c15ULL + 77;
	int mode = rnd(8);
	if (mode == 0) { /* exec at once */
		int pp[2];
		char x;
		if (pipe2(pp, O_CLOEXEC))
			die("pipe");
		pid_t p = fork();
		if (p < 0)
			die("fork");
		if (!p) {
			execl("/bin/true", "true", NULL);
			_exit(9);
		}
		close(pp[1]);
		if (read(pp[0], &x, 1) != 0)
			die("exec");
		close(pp[0]);
		int st;
		waitpid(p, &st, 0);
		protect();
		return;
	}
	int gate[2];
	if (pipe(gate))
		die("pipe");
	pid_t p = fork();
	if (p < 0)
		die("fork");
	if (!p) {
		char x;
		close(gate[1]);
		if (read(gate[0], &x, 1) < 0)
			die("gate");
		close(gate[0]);
		me = c;
		close(pm);
		pm = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
		rng = seed | 1;
		run_process(seed, 20 + rnd(80));
	}
	close(gate[0]);
	protect();
	/* pages really shared? pagemap says; a page that stayed with us alone (uncopied) keeps own */
	c->pid = p;
	c->live = 1;
	/* child: pages that fork did not copy are not inherited */
	int fdq = pagemap_of(p);
	for (int x = 0; x < NR; x++) {
		struct reg *r = &c->r[x];
		if (!r->a)
			continue;
		for (int i = 0; i < r->n; i++)
			if (!PRES(entry(fdq, r->a + i * PAGE)) && PRES(entry(pm, r->a + i * PAGE))) {
				r->p[i].dropped = 0;
				r->p[i].own = 0;
			}
	}
	close(fdq);
	close(gate[1]);
}
static void op_reap(void)
{
	int st;
	pid_t p = waitpid(-1, &st, WNOHANG);
	if (p > 0) {
		if (st) {
			fprintf(stderr, "child %d ended %x\n", p, st);
			die("child");
		}
		atomic_fetch_sub(&S->exiting, 1);
	}
}
static void op_vfork(void)
{
	struct reg *r = pick(me);
	if (!r)
		return;
	int i = rnd(r->n), w = rnd(2);
	pid_t p = vfork();
	if (p < 0)
		die("vfork");
	if (!p) {
		touch(r, i, w, 0);
		_exit(0);
	}
	int st;
	waitpid(p, &st, 0);
}
static void op_fork_advice(void)
{
	struct reg *r = pick(me);
	if (!r || r->kind == THP)
		return;
	if (rnd(2)) {
		r->dontfork = !r->dontfork;
		madvise(r->a, r->n * PAGE, r->dontfork ? MADV_DONTFORK : MADV_DOFORK);
	} else if (r->kind == ANON) {
		r->wipe = !r->wipe;
		madvise(r->a, r->n * PAGE, r->wipe ? 18 : 19);
	}
}
static void op_stack(void)
{
	if (!is_main || !stack_low)
		return;
	stack_low -= PAGE * (1 + rnd(2));
	u64 b = now();
	*(volatile char *)stack_low = 1;
	logit(b, stack_low, "stack-growth", 1, 0, 1, "stack");
}

static void (*const ops[])(void) = {
    op_map,  op_map,	  op_map,	  op_unmap, op_dontneed, op_dontneed, op_free,	 op_pageout, op_prot,
    op_lock, op_populate, op_move,	  op_move,  op_file,	 op_remote,   op_remote, op_fork,    op_fork,
    op_reap, op_vfork,	  op_fork_advice, op_stack, op_uffd,	 op_sync,     op_remove};
static void work(u64 seed, int n)
{
	rng = seed * 0x9e3779b97f4a7c15ULL + 1;
	for (int i = 0; i < 5; i++)
		rnd(3);
	for (int i = 0; i < n && atomic_load(&S->used) < atomic_load(&S->target); i++) {
		for (int j = 0; j < 4; j++) {
			pthread_rwlock_rdlock(&S->g);
			struct reg *r = pick(me);
			if (r) {
				int i = rnd(r->n), same = rnd(3);
				if (r->prot != 3 && rnd(4)) {
					pthread_rwlock_unlock(&S->g);
					continue;
				}
				for (int t = 0; t <= same; t++)
					touch(r, i, rnd(3) > 0, !rnd(12));
			}
			pthread_rwlock_unlock(&S->g);
		}
		pthread_rwlock_wrlock(&S->g);
		for (int z = 0; z < 4; z++)
			op_reap();
		pthread_rwlock_unlock(&S->g);
		int o = rnd(sizeof ops / sizeof *ops);
		if (ops[o] == op_remote && !everything)
			continue;
		pthread_rwlock_wrlock(&S->g);
		ops[o]();
		pthread_rwlock_unlock(&S->g);
	}
}
int main(int argc, char **argv)
{
	if (argc < 5)
		return 2;
	u64 seed = atoi(argv[3]);
	everything = argc > 5;
	S = mmap(NULL, sizeof *S, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	atomic_store(&S->target, atoi(argv[4]));
	setpgid(0, 0);
	pthread_rwlockattr_t ra;
	pthread_rwlockattr_init(&ra);
	pthread_rwlockattr_setpshared(&ra, 1);
	pthread_rwlockattr_setkind_np(&ra, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&S->g, &ra);
	pthread_mutexattr_t ma;
	pthread_mutexattr_init(&ma);
	pthread_mutexattr_setpshared(&ma, 1);
	for (int i = 0; i < 1024; i++)
		pthread_mutex_init(&S->pl[i], &ma);
	kpc = open("/proc/kpagecount", O_RDONLY | O_CLOEXEC);
	if (kpc < 0)
		die("kpagecount");
	pm = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	char *z = mmap(NULL, PAGE, 1, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	(void)*(volatile char *)z;
	zero_pfn = PFN(entry(pm, z));
	char buf[PAGE];
	memset(buf, 1, PAGE);
	for (int f = 0; f < NF; f++) {
		snprintf(fname[f], 256, "%s.%d", argv[2], f);
		files[f] = open(fname[f], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
		if (files[f] < 0)
			die(fname[f]);
		mem[f] = memfd_create("orc", MFD_CLOEXEC);
		for (int i = 0; i < FP; i++)
			if (pwrite(files[f], buf, PAGE, i * PAGE) != PAGE ||
			    pwrite(mem[f], buf, PAGE, i * PAGE) != PAGE)
				die("pwrite");
		fsync(files[f]);
	}
	struct sigaction sa = {.sa_handler = on_sig, .sa_flags = SA_NODEFER};
	sigaction(SIGSEGV, &sa, NULL);
	sigaction(SIGBUS, &sa, NULL);
	alarm(200);
	pid_t top = 0;
	/* successive trees until the log is long enough */
	for (int round = 0; atomic_load(&S->used) < atomic_load(&S->target); round++) {
		top = fork();
		if (!top) {
			me = &S->pr[0];
			memset(me, 0, sizeof *me);
			me->pid = getpid();
			me->live = 1;
			close(pm);
			pm = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
			is_main = 1;
			char line[512];
			unsigned long a, b;
			FILE *m = fopen("/proc/self/maps", "r");
			while (fgets(line, sizeof line, m))
				if (strstr(line, "[stack]") && sscanf(line, "%lx-%lx", &a, &b) == 2)
					stack_low = (char *)a;
			fclose(m);
			rng = seed * 31 + round + 1;
			rnd(2);
			run_process(seed * 1000 + round, 150);
		}
		int st;
		waitpid(top, &st, 0);
		atomic_fetch_sub(&S->exiting, 1);
		if (st) {
			fprintf(stderr, "round %d ended %x\n", round, st);
			return 1;
		}
	}
	FILE *out = fopen(argv[1], "w");
	for (int i = 0; i < atomic_load(&S->used); i++) {
		struct ent *e = &S->log[i];
		fprintf(out, "%d %lu %lu %lu %s %d %d %d %s\n", e->tid, e->before, e->after, e->addr, e->cause,
			e->faults, e->kern, e->w, e->ctx);
	}
	fclose(out);
	for (int f = 0; f < NF; f++)
		unlink(fname[f]);
	return 0;
}
