/* Takes page faults whose cause it knows, all causes mixed at random, in several processes and threads, and
 * writes one line for each access:  tid before_ns after_ns address cause faults
 * where `faults` says how many fault events the access must have made (0 or 1; -1: any, a race).
 *
 * usage: causes_oracle LOG FILE SEED ACCESSES PROCESSES THREADS
 * FILE: a file of at least 4 MiB on a disk file system, in the page cache; it is mapped, and written in part.
 */
#include "causes_log.h"

#define FILE_PAGES 1024

static const char *file_name;
static __thread int is_main;
/* A fork write-protects the pages of all threads: others must not be in the middle of an operation. */
static pthread_rwlock_t fork_lock;
static char *stack_low;
static int uffd = -1;

static void op_anon(void)
{
	char *p = anon(4);

	put(p, "first-write", 1);
	get(p, "none", 0);
	get(p + PAGE, "first-read", 1);
	put(p + PAGE, "zero-page-write", 1);
	put(p + 2 * PAGE + rnd(PAGE), "first-write", 1);
	munmap(p, 4 * PAGE);
}

static void op_dontneed(void)
{
	char *p = anon(4);

	put(p, "first-write", 1);
	put(p + PAGE, "first-write", 1);
	madvise(p, 4 * PAGE, MADV_DONTNEED);
	if (rnd(2))
		put(p, "after-dontneed", 1);
	else
		get(p, "after-dontneed", 1);
	put(p + 2 * PAGE, "first-write", 1);    /* was never in use: DONTNEED took nothing away */
	madvise(p, 4 * PAGE, MADV_DONTNEED);
	put(p + PAGE, "after-dontneed", 1);
	munmap(p, 4 * PAGE);
}

static void op_remap(void)
{
	char *p = anon(2), *q;

	put(p, "first-write", 1);
	q = mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	q = mremap(p, 2 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, q + 4 * PAGE);
	if (q == MAP_FAILED)
		die("mremap");
	put(q, "none", 0);
	put(q + PAGE, "first-write", 1);
	put(q + 5 * PAGE, "first-write", 1);
	munmap(q - 4 * PAGE, 16 * PAGE);
}

static void op_protect(void)
{
	char *p = anon(3);

	put(p, "first-write", 1);
	get(p + PAGE, "first-read", 1);
	mprotect(p, 3 * PAGE, PROT_READ);
	bad(p, 1, "invalid-permission");
	get(p, "none", 0);
	mprotect(p, 3 * PAGE, PROT_READ | PROT_WRITE);
	put(p, "none", 0);
	put(p + PAGE, "zero-page-write", 1);
	mprotect(p, 3 * PAGE, PROT_NONE);
	bad(p, 0, "invalid-permission");
	munmap(p, 3 * PAGE);
}

static void op_unmapped(void)
{
	bad((char *)(0x10000 + rnd(1 << 20) * PAGE % 0x300000), (int)rnd(2), "invalid-unmapped");
}

static void op_file(void)
{
	int fd = open(file_name, O_RDWR);
	size_t at = rnd(FILE_PAGES / 2 - 64);
	char *p;

	if (fd < 0)
		die(file_name);
	p = map(64, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, at * PAGE);
	get(p + 20 * PAGE, "file-page-cached", 1);
	put(p + 20 * PAGE, "file-cow", 1);
	put(p + 60 * PAGE, "file-cow", 1);
	get(p + 60 * PAGE, "none", 0);
	madvise(p + 60 * PAGE, PAGE, MADV_DONTNEED);
	get(p + 60 * PAGE, "after-dontneed", 1);
	munmap(p, 64 * PAGE);
	close(fd);
}

static void op_shared_file(void)
{
	/* The second half of the file: one slot a thread, so that nobody else cleans or dirties it. */
	size_t slot = FILE_PAGES / 2 + (syscall(SYS_gettid) % 30) * 16;
	int fd = open(file_name, O_RDWR);
	char *p;

	if (fd < 0)
		die(file_name);
	p = map(16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, slot * PAGE);
	get(p, "file-page-cached", 1);
	put(p, "write-notify", 1);
	if (!rnd(8)) {
		msync(p, PAGE, MS_SYNC);
		put(p, "write-notify", 1);
	}
	munmap(p, 16 * PAGE);
	close(fd);
}

static void op_end_of_file(void)
{
	int fd = open(file_name, O_RDONLY);
	char *p = map(FILE_PAGES + 8, PROT_READ, MAP_PRIVATE, fd, 0);

	bad(p + (FILE_PAGES + 4) * PAGE, 0, "invalid-end-of-file");
	munmap(p, (FILE_PAGES + 8) * PAGE);
	close(fd);
}

static void op_shmem(void)
{
	char *p = map(4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	put(p, "shared-page", 1);
	get(p + PAGE, "shared-page", 1);
	put(p + PAGE, "none", 0);
	get(p + 2 * PAGE, "shared-page", 1);
	mprotect(p + 2 * PAGE, 2 * PAGE, PROT_READ);
	mprotect(p + 2 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE);
	put(p + 2 * PAGE, "none", 0);   /* mprotect upgrades the entry itself */
	munmap(p, 4 * PAGE);
}

/* A file of one's own, clean and mapped by nobody else, so that it can be reclaimed at once. */
static void op_pageout(void)
{
	char name[4096], *p;
	uint64_t entry = 0;
	int fd, map_fd;

	snprintf(name, sizeof(name), "%s.%ld", file_name, (long)syscall(SYS_gettid));
	fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || pwrite(fd, "x", 1, PAGE) != 1 || fsync(fd))
		die(name);
	p = map(2, PROT_READ, MAP_PRIVATE, fd, 0);
	get(p + PAGE, "file-page-cached", 1);
	madvise(p, 2 * PAGE, 21); /* MADV_PAGEOUT */
	map_fd = open("/proc/self/pagemap", O_RDONLY);
	if (map_fd >= 0 && pread(map_fd, &entry, 8, ((uint64_t)p / PAGE + 1) * 8) == 8 && !(entry >> 63))
		get(p + PAGE, "after-pageout", 1);
	close(map_fd);
	munmap(p, 2 * PAGE);
	close(fd);
	unlink(name);
}

static void op_syscall(void)
{
	char *p = anon(2);
	int fd = open(file_name, O_RDONLY);
	uint64_t t = now();

	if (pread(fd, p, 100, 0) != 100)
		die("pread");
	note(t, p, "kernel-access", 1);
	put(p, "none", 0);
	close(fd);
	munmap(p, 2 * PAGE);
}

static void op_populate(void)
{
	char *p = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	put(p, "none", 0);
	munmap(p, 4 * PAGE);
	p = anon(4);
	if (!mlock(p, 2 * PAGE))
		put(p + PAGE, "none", 0);
	put(p + 3 * PAGE, "first-write", 1);
	munmap(p, 4 * PAGE);
	p = anon(2);
	if (!madvise(p, 2 * PAGE, MADV_POPULATE_READ)) {
		get(p, "none", 0);
		put(p, "zero-page-write", 1);
	}
	munmap(p, 2 * PAGE);
}

static void op_huge(void)
{
	char *raw = anon(1024), *p = (char *)(((uintptr_t)raw + HUGE - 1) & ~(HUGE - 1));

	madvise(p, HUGE, MADV_HUGEPAGE);
	put(p + rnd(HUGE), "huge-page", 1);
	put(p + rnd(HUGE), "none", 0);
	munmap(raw, 1024 * PAGE);
}

static void op_brk(void)
{
	if (is_main) {
		char *p = sbrk(2 * PAGE);

		if (p != (char *)-1)
			put((char *)(((uintptr_t)p + PAGE - 1) & ~(PAGE - 1)), "first-write", 1);
	}
}

static void op_stack(void)
{
	if (is_main && stack_low) {
		stack_low -= PAGE * (1 + rnd(2));
		put(stack_low, "stack-growth", 1);
	}
}

static void op_uffd(void)
{
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	char *p;

	if (uffd < 0)
		return;
	p = anon(2);
	reg.range.start = (uint64_t)p;
	reg.range.len = 2 * PAGE;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	if (rnd(2))
		put(p, "userfaultfd", 1);
	else
		get(p, "userfaultfd", 1);
	put(p + PAGE, "userfaultfd", 1);
	munmap(p, 2 * PAGE);
}

static void *uffd_handler(void *unused)
{
	struct uffd_msg msg;
	char *page = unused;

	for (;;) {
		struct uffdio_copy copy = { .len = PAGE };

		if (read(uffd, &msg, sizeof(msg)) != sizeof(msg))
			continue;
		if (msg.event != UFFD_EVENT_PAGEFAULT)
			continue;
		copy.src = (uint64_t)page;
		copy.dst = msg.arg.pagefault.address & ~(PAGE - 1);
		ioctl(uffd, UFFDIO_COPY, &copy);
	}
	return NULL;
}

/* One child at a time in this process: so who shares a page is known. */
static void op_fork(void)
{
	char *p, *lib;
	int go[2], done[2], fd, status;
	char byte;
	pid_t child;

	p = anon(8);
	fd = open(file_name, O_RDWR);
	lib = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	put(p, "first-write", 1);
	put(p + PAGE, "first-write", 1);
	put(p + 2 * PAGE, "first-write", 1);
	get(p + 3 * PAGE, "first-read", 1);
	put(lib, "file-cow", 1);
	put(lib + PAGE, "file-cow", 1);
	if (pipe(go) || pipe(done))
		die("pipe");
	child = fork();
	if (child < 0)
		die("fork");
	if (!child) {
		put(p, "fork-cow-child", 1);
		put(p, "none", 0);
		put(p + 4 * PAGE, "first-write", 1);
		put(p + 3 * PAGE, "zero-page-write", 1);
		put(lib, "fork-cow-child", 1);
		put(lib + 4 * PAGE, "file-cow", 1);
		if (write(done[1], "x", 1) != 1 || read(go[0], &byte, 1) != 1)
			_exit(6);
		_exit(0);
	}
	if (read(done[0], &byte, 1) != 1)
		die("read");
	put(p + PAGE, "fork-cow-parent", 1);
	put(lib + PAGE, "fork-cow-parent", 1);
	put(p + PAGE, "none", 0);
	put(p + 3 * PAGE, "zero-page-write", 1);
	put(p + 5 * PAGE, "first-write", 1);
	if (!rnd(10)) {
		put(p, "sharers-gone", 1);      /* the child has its own copy */
	}
	if (write(go[1], "x", 1) != 1)
		die("write");
	waitpid(child, &status, 0);
	if (status)
		_exit(7);
	if (!rnd(10))
		put(p + 2 * PAGE, "sharers-gone", 1);
	close(go[0]), close(go[1]), close(done[0]), close(done[1]), close(fd);
	munmap(p, 8 * PAGE);
	munmap(lib, 8 * PAGE);
}

struct race {
	pthread_barrier_t start, end;
	char *page;
};

static void *racer(void *arg)
{
	struct race *r = arg;

	pthread_barrier_wait(&r->start);
	put(r->page + 8, "race", -1);
	pthread_barrier_wait(&r->end);
	return NULL;
}

static void op_race(void)
{
	struct race r;
	pthread_t t;

	r.page = anon(1);
	pthread_barrier_init(&r.start, NULL, 2);
	pthread_barrier_init(&r.end, NULL, 2);
	if (pthread_create(&t, NULL, racer, &r))
		die("pthread_create");
	pthread_barrier_wait(&r.start);
	put(r.page, "race", -1);
	pthread_barrier_wait(&r.end);
	pthread_join(t, NULL);
	munmap(r.page, PAGE);
}

static void (*const ops[])(void) = {
	op_anon, op_anon, op_dontneed, op_remap, op_protect, op_unmapped, op_file, op_file, op_shared_file,
	op_end_of_file, op_shmem, op_syscall, op_populate, op_huge, op_brk, op_stack, op_uffd, op_fork, op_race, op_pageout,
};

static void work(uint64_t seed)
{
	rng = seed * 0x9e3779b97f4a7c15ULL + 1;
	while (atomic_load(&sh->used) < atomic_load(&sh->target)) {
		void (*op)(void) = ops[rnd(sizeof(ops) / sizeof(ops[0]))];

		if (op == op_fork)
			pthread_rwlock_wrlock(&fork_lock);
		else
			pthread_rwlock_rdlock(&fork_lock);
		op();
		pthread_rwlock_unlock(&fork_lock);
	}
}

static void *thread(void *arg)
{
	work((uint64_t)(uintptr_t)arg);
	return NULL;
}

static void find_stack(void)
{
	unsigned long a, b;
	char line[512];
	FILE *f = fopen("/proc/self/maps", "r");

	while (f && fgets(line, sizeof(line), f))
		if (strstr(line, "[stack]") && sscanf(line, "%lx-%lx", &a, &b) == 2)
			stack_low = (char *)a;
	if (f)
		fclose(f);
}

static void process(uint64_t seed, int threads)
{
	pthread_t t[64];
	struct uffdio_api api = { .api = UFFD_API };

	pthread_rwlockattr_t attr;

	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&fork_lock, &attr);
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	if (uffd >= 0 && ioctl(uffd, UFFDIO_API, &api))
		uffd = -1;
	if (uffd >= 0 && pthread_create(&t[0], NULL, uffd_handler, memset(aligned_alloc(PAGE, PAGE), 7, PAGE)))
		die("pthread_create");
	for (int i = 1; i < threads; i++)
		if (pthread_create(&t[i], NULL, thread, (void *)(uintptr_t)(seed * 100 + i)))
			die("pthread_create");
	is_main = 1;
	find_stack();
	work(seed * 100);
	for (int i = 1; i < threads; i++)
		pthread_join(t[i], NULL);
	_exit(0);
}

int main(int argc, char **argv)
{
	int seed, processes, threads, status, bad_end = 0;

	if (argc != 7)
		return 2;
	file_name = argv[2];
	seed = atoi(argv[3]);
	processes = atoi(argv[5]);
	threads = atoi(argv[6]);
	begin_log(atoi(argv[4]));
	for (int i = 0; i < processes; i++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork");
		if (!pid)
			process((uint64_t)seed * 64 + i + 1, threads);
	}
	while (wait(&status) > 0)
		bad_end |= status;
	if (bad_end) {
		fprintf(stderr, "causes_oracle: a process ended with %#x\n", bad_end);
		return 1;
	}
	return write_log(argv[1]);
}
