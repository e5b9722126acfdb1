/* The sibling of causes_oracle: rarer layouts and calls, each with the cause that is true of it. One thread a process
 * (so that forks write-protect nobody else's pages), several processes, all operations mixed at random.
 *
 * usage: causes_layouts LOG FILE SEED ACCESSES PROCESSES [OPERATION]
 * FILE: a file of at least 4 MiB on a disk file system, in the page cache. OPERATION: only that one, by name.
 */
#include "causes_log.h"

#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define FILE_PAGES 1024
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#define GUARD_INSTALL 102
#define GUARD_REMOVE 103
#define COLLAPSE 25
#define RW (PROT_READ | PROT_WRITE)

static const char *file_name;

/* A child that does its part while we wait for it, stays alive during `meanwhile`, and ends well. */
static void with_child(void (*child)(char *), void (*meanwhile)(char *), char *p)
{
	int done[2], go[2], status;
	char byte = 0;
	pid_t pid;

	if (pipe(done) || pipe(go))
		die("pipe");
	pid = fork();
	if (pid < 0)
		die("fork");
	if (!pid) {
		if (child)
			child(p);
		if (write(done[1], "x", 1) != 1 || read(go[0], &byte, 1) != 1)
			_exit(6);
		_exit(0);
	}
	if (read(done[0], &byte, 1) != 1)
		die("read");
	if (meanwhile)
		meanwhile(p);
	if (write(go[1], "x", 1) != 1)
		die("write");
	waitpid(pid, &status, 0);
	if (status)
		_exit(7);
	close(done[0]), close(done[1]), close(go[0]), close(go[1]);
}

static char *huge_block(char **raw)
{
	*raw = anon(1024);
	char *p = (char *)(((uintptr_t)*raw + HUGE - 1) & ~(HUGE - 1));

	madvise(p, HUGE, MADV_HUGEPAGE);
	return p;
}

/* Whether one huge page is mapped there: the kernel may have had none to give. */
static int is_huge(char *p)
{
	unsigned long a, b, kb = 0;
	char line[256];
	int here = 0;
	FILE *f = fopen("/proc/self/smaps", "r");

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "%lx-%lx ", &a, &b) == 2)
			here = a <= (uintptr_t)p && (uintptr_t)p < b;
		else if (here && sscanf(line, "AnonHugePages: %lu", &kb) == 1)
			break;
	if (f)
		fclose(f);
	return kb > 0;
}

static void op_huge_drop(void)
{
	char *raw, *p = huge_block(&raw);
	uint64_t t = now();
	int page = 1 + rnd(511);

	*p = 1;
	if (is_huge(p)) {
		note(t, p, "huge-page", 1);
		madvise(p + page * PAGE, PAGE, MADV_DONTNEED);
		put(p + page * PAGE, "after-dontneed", 1);
		put(p + (page == 1 ? 2 : 1) * PAGE, "none", 0);
	}
	munmap(raw, 1024 * PAGE);
}

static void huge_child(char *p)
{
	put(p + 7 * PAGE, "fork-cow-child", 1);
}

static void huge_parent(char *p)
{
	put(p + 9 * PAGE, "fork-cow-parent", 1);
}

static void op_huge_fork(void)
{
	char *raw, *p = huge_block(&raw);
	uint64_t t = now();

	*p = 1;
	if (is_huge(p)) {
		note(t, p, "huge-page", 1);
		with_child(huge_child, huge_parent, p);
	}
	munmap(raw, 1024 * PAGE);
}

static void op_collapse(void)
{
	char *raw, *p = huge_block(&raw);

	madvise(p, HUGE, MADV_NOHUGEPAGE);
	for (int i = 0; i < 8; i++)
		put(p + i * PAGE, "first-write", 1);
	madvise(p, HUGE, MADV_HUGEPAGE);
	if (!madvise(p, HUGE, COLLAPSE)) {
		put(p + (8 + rnd(500)) * PAGE, "none", 0);
		madvise(p + 20 * PAGE, PAGE, MADV_DONTNEED);
		put(p + 20 * PAGE, "after-dontneed", 1);
	}
	munmap(raw, 1024 * PAGE);
}

static char *memory;

static void memfd_child(char *unused)
{
	char *q = mmap(NULL, 8 * PAGE, RW, MAP_SHARED, (int)(intptr_t)memory, 0);

	(void)unused;
	get(q, "shared-page", 1);
	put(q, "none", 0);
	put(q + 4 * PAGE, "shared-page", 1);
}

static void op_memfd(void)
{
	int fd = memfd_create("layouts", 0);
	char *p, *q;

	if (fd < 0 || ftruncate(fd, 8 * PAGE))
		die("memfd");
	p = map(8, RW, MAP_SHARED, fd, 0);
	put(p, "shared-page", 1);
	memory = (char *)(intptr_t)fd;
	with_child(memfd_child, NULL, NULL);
	madvise(p, PAGE, 9); /* MADV_REMOVE */
	put(p, "after-dontneed", 1);
	q = map(8, RW, MAP_PRIVATE, fd, 0);
	put(q, "file-cow", 1);
	get(q, "none", 0);
	munmap(q, 8 * PAGE);
	put(p + 6 * PAGE, "shared-page", 1);
	ftruncate(fd, 4 * PAGE);
	bad(p + 6 * PAGE, rnd(2), "invalid-end-of-file");
	munmap(p, 8 * PAGE);
	close(fd);
}

static void op_dev_shm(void)
{
	char name[64], *p;
	int fd;

	snprintf(name, sizeof(name), "/dev/shm/layouts.%d", getpid());
	fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || ftruncate(fd, 8 * PAGE))
		die(name);
	p = map(8, RW, MAP_SHARED, fd, 0);
	get(p, "shared-page", 1);
	put(p, "none", 0);
	put(p + PAGE, "shared-page", 1);
	munmap(p, 8 * PAGE);
	close(fd);
	unlink(name);
}

static void op_sysv(void)
{
	int id = shmget(IPC_PRIVATE, 8 * PAGE, IPC_CREAT | 0600);
	char *p = shmat(id, NULL, 0);

	if (p == (char *)-1)
		die("shmat");
	put(p, "shared-page", 1);
	get(p + 3 * PAGE, "shared-page", 1);
	put(p + 3 * PAGE, "none", 0);
	shmctl(id, IPC_RMID, NULL);
	shmdt(p);
	bad(p, 0, "invalid-unmapped");
}

static void op_dontunmap(void)
{
	char *p = anon(4), *q;

	put(p, "first-write", 1);
	q = mremap(p, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | 4);
	if (q != MAP_FAILED) {
		put(q, "none", 0);
		put(p, "first-write", 1);
		put(q + PAGE, "first-write", 1);
		munmap(q, 4 * PAGE);
	}
	munmap(p, 4 * PAGE);
}

static void op_shrink(void)
{
	char *p = anon(8), *q;

	put(p, "first-write", 1);
	put(p + 6 * PAGE, "first-write", 1);
	q = mremap(p, 8 * PAGE, 4 * PAGE, 0);
	if (q != p)
		die("mremap");
	bad(p + 6 * PAGE, rnd(2), "invalid-unmapped");
	put(p, "none", 0);
	munmap(p, 4 * PAGE);
}

static void wipe_child(char *p)
{
	get(p, "first-read", 1);
	put(p, "zero-page-write", 1);
	put(p + PAGE, "first-write", 1);
	bad(p + 4 * PAGE, 0, "invalid-unmapped");
	put(p + 9 * PAGE, "fork-cow-child", 1);
}

static void op_wipe(void)
{
	char *p = anon(12);

	put(p, "first-write", 1);
	put(p + PAGE, "first-write", 1);
	put(p + 4 * PAGE, "first-write", 1);
	put(p + 9 * PAGE, "first-write", 1);
	madvise(p, 2 * PAGE, MADV_WIPEONFORK);
	madvise(p + 4 * PAGE, 2 * PAGE, MADV_DONTFORK);
	with_child(wipe_child, NULL, p);
	put(p + 4 * PAGE, "none", 0);   /* nobody got it */
	put(p, "none", 0);
	munmap(p, 12 * PAGE);
}

static void op_onfault(void)
{
	char *p = anon(4);

	mlock2(p, 4 * PAGE, 1);
	put(p, "first-write", 1);
	munmap(p, 4 * PAGE);
	p = map(8, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bad(p + 2 * PAGE, rnd(2), "invalid-permission");
	mprotect(p + PAGE, 3 * PAGE, RW);
	put(p + 2 * PAGE, "first-write", 1);
	get(p + 3 * PAGE, "first-read", 1);
	bad(p + 5 * PAGE, 1, "invalid-permission");
	munmap(p, 8 * PAGE);
}

static void op_guard(void)
{
	char *p = anon(4);

	put(p, "first-write", 1);
	if (!madvise(p, 2 * PAGE, GUARD_INSTALL)) {
		bad(p, rnd(2), "invalid-permission");
		bad(p + PAGE, rnd(2), "invalid-permission");
		madvise(p, 2 * PAGE, GUARD_REMOVE);
		put(p, "after-dontneed", 1);
		put(p + PAGE, "first-write", 1);
	}
	put(p + 2 * PAGE, "first-write", 1);
	madvise(p + 2 * PAGE, PAGE, MADV_FREE);
	put(p + 2 * PAGE, "none", 0);
	munmap(p, 4 * PAGE);
}

static void op_populate(void)
{
	char *p = anon(4);

	if (!madvise(p, PAGE, MADV_POPULATE_READ)) {
		put(p, "zero-page-write", 1);
		madvise(p + PAGE, PAGE, MADV_POPULATE_WRITE);
		put(p + PAGE, "none", 0);
		madvise(p + PAGE, PAGE, MADV_DONTNEED);
		put(p + PAGE, "after-dontneed", 1);
	}
	munmap(p, 4 * PAGE);
}

static void op_private_file(void)
{
	int fd = open(file_name, O_RDWR);
	size_t at = rnd(FILE_PAGES / 2 - 64);
	char *p;

	if (fd < 0)
		die(file_name);
	p = map(4, RW, MAP_PRIVATE | MAP_POPULATE, fd, at * PAGE);
	put(p, "none", 0);
	munmap(p, 4 * PAGE);
	p = map(4, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, at * PAGE);
	get(p, "none", 0);
	mprotect(p, 4 * PAGE, RW);
	put(p, "file-cow", 1);
	madvise(p, PAGE, MADV_DONTNEED);
	put(p, "after-dontneed", 1);
	bad((char *)((uintptr_t)p + 4 * PAGE * 0) - 0x7000000000, 0, "invalid-unmapped");
	munmap(p, 4 * PAGE);
	close(fd);
	fd = open("/dev/zero", O_RDWR);
	p = map(4, RW, MAP_PRIVATE, fd, 0);
	put(p, "first-write", 1);
	get(p + PAGE, "first-read", 1);
	munmap(p, 4 * PAGE);
	p = map(4, RW, MAP_SHARED, fd, 0);
	put(p, "shared-page", 1);
	munmap(p, 4 * PAGE);
	close(fd);
}

static void op_kernel(void)
{
	char *p = anon(4);
	struct iovec here = { p + PAGE, 64 }, there = { p + 2 * PAGE, 64 };
	int fd = open(file_name, O_RDONLY), zero = open("/dev/zero", O_RDONLY);
	uint64_t t = now();

	if (read(zero, p, 64) != 64)
		die("read");
	note(t, p, "kernel-access", 1);
	put(p, "none", 0);
	madvise(p, PAGE, MADV_DONTNEED);
	t = now();
	if (pread(fd, p, 64, 0) != 64)
		die("pread");
	note(t, p, "kernel-access", 1);
	put(p + PAGE, "first-write", 1);
	if (process_vm_writev(getpid(), &here, 1, &there, 1, 0) == 64)
		put(p + 2 * PAGE, "none", 0);   /* the kernel made it present for the call */
	close(fd), close(zero);
	munmap(p, 4 * PAGE);
}

static void op_fixed(void)
{
	char *p = anon(8), *q;

	put(p + 2 * PAGE, "first-write", 1);
	q = mmap(p + 2 * PAGE, 2 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (q != p + 2 * PAGE)
		die("mmap");
	get(q, "first-read", 1);
	put(q, "zero-page-write", 1);
	q = mmap(p + 4 * PAGE, 2 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	put(q, "shared-page", 1);
	munmap(p + 2 * PAGE, PAGE);
	bad(p + 2 * PAGE, 1, "invalid-unmapped");
	munmap(p, 8 * PAGE);
}

static void op_brk(void)
{
	char *p = sbrk(8 * PAGE), *page;

	if (p == (char *)-1)
		return;
	page = (char *)(((uintptr_t)p + PAGE - 1) & ~(PAGE - 1)) + 4 * PAGE;
	put(page, "first-write", 1);
	sbrk(-8 * (long)PAGE);
	bad(page, 0, "invalid-unmapped");
	sbrk(8 * PAGE);
	put(page, "first-write", 1);
}

static void rights_parent(char *p)
{
	mprotect(p, PAGE, PROT_READ);
	mprotect(p, PAGE, RW);
	put(p, "fork-cow-parent", 1);
	put(p, "none", 0);
}

static void op_rights(void)
{
	char *p = anon(2);

	put(p, "first-write", 1);
	with_child(NULL, rights_parent, p);
	munmap(p, 2 * PAGE);
}

/* Three generations: p[0] is written by the youngest first, p[1] by the oldest, p[2] by the one between. */
static void grandchild(char *p)
{
	put(p, "fork-cow-child", 1);
	put(p, "none", 0);
	put(p + 4 * PAGE, "first-write", 1);
}

static void child_after(char *p)
{
	put(p + 2 * PAGE, "fork-cow-child", 1);
}

static void child(char *p)
{
	with_child(grandchild, child_after, p);
	put(p + 3 * PAGE, "fork-cow-child", 1);
}

static void parent(char *p)
{
	put(p + PAGE, "fork-cow-parent", 1);
	if (!rnd(5)) /* both descendants have copies, or are gone: its outcome is open, so not often */
		put(p + 2 * PAGE, "sharers-gone", 1);
}

static void op_nested(void)
{
	char *p = anon(8);

	for (int i = 0; i < 4; i++)
		put(p + i * PAGE, "first-write", 1);
	with_child(child, parent, p);
	munmap(p, 8 * PAGE);
}

static void op_vfork(void)
{
	char *p = anon(4);
	pid_t pid;
	int status;

	put(p, "first-write", 1);
	pid = vfork();
	if (!pid) {
		put(p + PAGE, "first-write", 1);
		put(p, "none", 0);
		execl("/bin/true", "true", NULL);
		_exit(1);
	}
	waitpid(pid, &status, 0);
	put(p + PAGE, "none", 0);
	put(p, "none", 0);
	munmap(p, 4 * PAGE);
}

static void *deep(void *arg)
{
	volatile char room[40 * PAGE];

	put(room + 4 * PAGE, "first-write", 1);
	put(room + 4 * PAGE, "none", 0);
	return arg;
}

static void op_thread_stack(void)
{
	pthread_attr_t attr;
	pthread_t t;
	char *stack = anon(64);

	pthread_attr_init(&attr);
	pthread_attr_setstack(&attr, stack, 64 * PAGE);
	if (pthread_create(&t, &attr, deep, NULL))
		die("pthread_create");
	pthread_join(t, NULL);
	pthread_attr_destroy(&attr);
	munmap(stack, 64 * PAGE);
}

static void op_growsdown(void)
{
	char *p = map(600, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *q;

	munmap(p, 600 * PAGE);
	q = mmap(p + 590 * PAGE, 4 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
	if (q == MAP_FAILED)
		die("MAP_GROWSDOWN");
	put(q, "first-write", 1);
	put(q - 3 * PAGE, "stack-growth", 1);
	put(q - PAGE, "first-write", 1);
	munmap(q - 3 * PAGE, 7 * PAGE);
}

static void shared_child(char *p)
{
	get(p, "shared-page", 1);
	put(p + PAGE, "shared-page", 1);
	put(p, "none", 0);
}

static void op_shared_fork(void)
{
	char *p = map(4, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	put(p, "shared-page", 1);
	with_child(shared_child, NULL, p);
	put(p + PAGE, "shared-page", 1);
	put(p, "none", 0);
	munmap(p, 4 * PAGE);
}

/* Write-protected through userfaultfd without a handler: the kernel notes the write and goes on. */
static void op_wp_async(void)
{
	struct uffdio_api api = { .api = UFFD_API, .features = 1 << 15 | 1 << 13 }; /* WP_ASYNC, WP_UNPOPULATED */
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	char *p = anon(4);

	if (fd >= 0 && !ioctl(fd, UFFDIO_API, &api)) {
		put(p, "first-write", 1);
		reg.range.start = wp.range.start = (uint64_t)p;
		reg.range.len = wp.range.len = 4 * PAGE;
		if (ioctl(fd, UFFDIO_REGISTER, &reg) || ioctl(fd, UFFDIO_WRITEPROTECT, &wp))
			die("UFFDIO_WRITEPROTECT");
		get(p, "none", 0);
		put(p, "userfaultfd", 1);
		put(p, "none", 0);
	}
	if (fd >= 0)
		close(fd);
	munmap(p, 4 * PAGE);
}

static int uffd_fd;
static char *uffd_page;

static void *answer(void *arg)
{
	struct uffd_msg msg;

	while (read(uffd_fd, &msg, sizeof(msg)) == sizeof(msg)) {
		uint64_t at = msg.arg.pagefault.address & ~(PAGE - 1);
		struct uffdio_copy copy = { .src = (uint64_t)uffd_page, .dst = at, .len = PAGE };
		struct uffdio_zeropage zero = { .range = { at, PAGE } };
		struct uffdio_writeprotect wp = { .range = { at, PAGE } };

		if (msg.event != UFFD_EVENT_PAGEFAULT)
			continue;
		if (msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
			ioctl(uffd_fd, UFFDIO_WRITEPROTECT, &wp);
		else if (at & PAGE)
			ioctl(uffd_fd, UFFDIO_ZEROPAGE, &zero);
		else
			ioctl(uffd_fd, UFFDIO_COPY, &copy);
	}
	return arg;
}

static void op_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	struct uffdio_copy copy = { .len = PAGE };
	char *raw = anon(10), *p = (char *)(((uintptr_t)raw + 2 * PAGE - 1) & ~(2 * PAGE - 1));
	pthread_t t;

	uffd_page = memset(anon(1), 7, PAGE);
	uffd_fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	if (uffd_fd >= 0 && !ioctl(uffd_fd, UFFDIO_API, &api)) {
		reg.range.start = wp.range.start = (uint64_t)p;
		reg.range.len = wp.range.len = 8 * PAGE;
		if (ioctl(uffd_fd, UFFDIO_REGISTER, &reg))
			die("UFFDIO_REGISTER");
		copy.dst = (uint64_t)p + 4 * PAGE;
		copy.src = (uint64_t)uffd_page;
		if (ioctl(uffd_fd, UFFDIO_COPY, &copy))
			die("UFFDIO_COPY");
		if (pthread_create(&t, NULL, answer, NULL))
			die("pthread_create");
		get(p + 4 * PAGE, "none", 0);
		put(p + 4 * PAGE, "none", 0);
		put(p, "userfaultfd", 1);
		get(p + PAGE, "userfaultfd", 1);        /* answered with the zero page */
		put(p + PAGE, "zero-page-write", 1);
		if (!ioctl(uffd_fd, UFFDIO_WRITEPROTECT, &wp)) {
			get(p, "none", 0);
			put(p, "userfaultfd", 1);
			put(p, "none", 0);
		}
		ioctl(uffd_fd, UFFDIO_UNREGISTER, &reg.range);
		put(p + 2 * PAGE, "first-write", 1);
		pthread_cancel(t);
		pthread_join(t, NULL);
	}
	if (uffd_fd >= 0)
		close(uffd_fd);
	munmap(raw, 10 * PAGE);
	munmap(uffd_page, PAGE);
}

static void op_moved_file(void)
{
	int fd = open(file_name, O_RDWR);
	char *p = map(8, RW, MAP_PRIVATE, fd, 0), *q;

	get(p + 2 * PAGE, "file-page-cached", 1);
	q = mremap(p, 8 * PAGE, 16 * PAGE, MREMAP_MAYMOVE);
	if (q == MAP_FAILED)
		die("mremap");
	get(q + 2 * PAGE, "none", 0);
	put(q + 2 * PAGE, "file-cow", 1);
	put(q + 12 * PAGE, "file-cow", 1);
	munmap(q, 16 * PAGE);
	close(fd);
}

#define OP(name) { #name, op_##name }
static const struct op {
	const char *name;
	void (*run)(void);
} ops[] = {
	OP(huge_drop), OP(huge_fork), OP(collapse), OP(memfd), OP(dev_shm), OP(sysv), OP(dontunmap), OP(shrink),
	OP(wipe), OP(onfault), OP(guard), OP(populate), OP(private_file), OP(kernel), OP(fixed), OP(brk), OP(rights),
	OP(nested), OP(vfork), OP(thread_stack), OP(growsdown), OP(shared_fork), OP(wp_async), OP(uffd), OP(moved_file),
};

int main(int argc, char **argv)
{
	int processes, status, bad_end = 0;

	if (argc < 6)
		return 2;
	file_name = argv[2];
	processes = atoi(argv[5]);
	begin_log(atoi(argv[4]));
	for (int i = 0; i < processes; i++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork");
		if (pid)
			continue;
		rng = ((uint64_t)atoi(argv[3]) * 64 + i + 1) * 0x9e3779b97f4a7c15ULL + 1;
		while (atomic_load(&sh->used) < atomic_load(&sh->target)) {
			const struct op *op = &ops[rnd(sizeof(ops) / sizeof(ops[0]))];

			if (argc < 7 || !strcmp(argv[6], op->name))
				op->run();
		}
		_exit(0);
	}
	while (wait(&status) > 0)
		bad_end |= status;
	if (bad_end) {
		fprintf(stderr, "causes_layouts: a process ended with %#x\n", bad_end);
		return 1;
	}
	return write_log(argv[1]);
}
