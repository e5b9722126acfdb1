/* Writes known pages at random and says which. Protocol, on stdin/stdout:
 *   go SEED OPS   do OPS random operations; answers, for every arena that exists then,
 *                   A ADDR PAGES KIND FRESH      KIND: a private anonymous, h the same with huge pages wanted,
 *                                                s shared anonymous, f private file, g shared file, b heap;
 *                                                FRESH: mapped, moved or replaced since the last `go`
 *                   W ADDR PAGES                 pages that must be listed
 *                   M N                          mappings moved (mremap) since the last `go`
 *                 W lines also come for known pages of the stack; then one line "."
 *   fill SEED N   writers: N threads write at random until `halt`; answers "."
 *   sum           a checksum of all arenas
 * Arguments: "nohuge" leaves out huge pages; "dropped" forgets writes to shared pages whose entries are dropped
 * before the next report (which soft-dirty declares to miss).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define MAX_PAGES 2048
#define MAX_ARENAS 12

struct arena {
	char *at;
	size_t pages;
	char kind;
	int fresh;
	char written[MAX_PAGES], content[MAX_PAGES], before[MAX_PAGES];
	char other[MAX_PAGES]; /* of memory that another mapping replaced, whatever it held */
};

static struct arena arenas[MAX_ARENAS];
static char *stack_low, *stack_high;
static int zero_fd, file_fd, direct_fd;
static uint64_t state;
static int moves;
static int huge_ok = 1, huge_always, forget_dropped;
static volatile int halt;

static uint64_t rnd(uint64_t n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return n ? state % n : 0;
}

static struct arena *pick(void)
{
	for (int i = 0; i < 50; i++) {
		struct arena *a = &arenas[rnd(MAX_ARENAS)];
		if (a->at)
			return a;
	}
	return NULL;
}

static void wrote(struct arena *a, size_t first, size_t n)
{
	memset(a->written + first, 1, n);
	memset(a->content + first, 1, n);
}

/* Small pages, also where the machine's setting is "always": which reasons fit is judged by the kind. */
static void small_pages(void *at, size_t pages)
{
	if (huge_always)
		madvise(at, pages * PAGE, MADV_NOHUGEPAGE);
}

static void map_new(struct arena *a, char kind)
{
	size_t pages = 1 + rnd(kind == 'h' ? MAX_PAGES : 300);
	int prot = PROT_READ | PROT_WRITE;
	memset(a, 0, sizeof(*a));
	if (kind == 'b') {
		for (int i = 0; i < MAX_ARENAS; i++)
			if (arenas[i].kind == 'b')
				return;
		char *at = sbrk((intptr_t)(pages * PAGE + PAGE));
		if (at == (char *)-1)
			return;
		a->at = (char *)(((uintptr_t)at + PAGE - 1) & ~(PAGE - 1));
	} else if (kind == 'h') {
		char *at = mmap(NULL, 12ul << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *aligned = (char *)(((uintptr_t)at + (2ul << 20) - 1) & ~((2ul << 20) - 1));
		pages = 1024;
		a->at = mmap(aligned, pages * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		munmap(at, (size_t)(aligned - at));
		munmap(aligned + pages * PAGE, (12ul << 20) - (size_t)(aligned - at) - pages * PAGE);
		if (huge_ok)
			madvise(a->at, pages * PAGE, MADV_HUGEPAGE);
	} else {
		int flags = kind == 's' ? MAP_SHARED | MAP_ANONYMOUS : kind == 'g' ? MAP_SHARED :
			    kind == 'f' ? MAP_PRIVATE : MAP_PRIVATE | MAP_ANONYMOUS;
		int fd = kind == 'f' || kind == 'g' ? file_fd : -1;
		a->at = mmap(NULL, pages * PAGE, prot, flags, fd, 0);
	}
	if (a->at == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	if (kind != 'h')
		small_pages(a->at, pages);
	a->pages = pages;
	a->kind = kind;
	a->fresh = 1;
}

static void fail(const char *what, const struct arena *a)
{
	char text[4096];
	ssize_t n;
	int fd = open("/proc/self/smaps", O_RDONLY);
	fprintf(stderr, "%s: %s: %lx, %zu pages\n", what, strerror(errno), (unsigned long)a->at, a->pages);
	while ((n = read(fd, text, sizeof(text))) > 0)
		fwrite(text, 1, (size_t)n, stderr);
	exit(1);
}

static int is_private(const struct arena *a) { return a->kind != 's' && a->kind != 'g'; }

static void discard(struct arena *a, size_t first, size_t n)
{
	if (madvise(a->at + first * PAGE, n * PAGE, MADV_DONTNEED))
		return;
	if (!is_private(a)) {
		if (a->fresh || forget_dropped) /* declared: written and dropped before it was (first) looked at */
			memset(a->written + first, 0, n);
		return;
	}
	memset(a->written + first, 0, n);
	memset(a->content + first, 0, n);
}

struct job { struct arena *a; size_t first, n; };

static void *write_job(void *arg)
{
	struct job *j = arg;
	for (size_t i = 0; i < j->n; i++)
		j->a->at[(j->first + i) * PAGE + rnd(PAGE)] += 1;
	return NULL;
}

static __attribute__((noinline)) void deep(int levels)
{
	volatile char frame[PAGE * 2];
	frame[0] = 1;
	frame[PAGE] = 1;
	if (!stack_low || (char *)frame < stack_low)
		stack_low = (char *)frame;
	if ((char *)frame + PAGE > stack_high)
		stack_high = (char *)frame + PAGE;
	if (levels)
		deep(levels - 1);
	frame[1] = 1;
}

static void operation(void)
{
	static const char kinds[] = "aaaasfghb";
	struct arena *a = pick();
	uint64_t what = rnd(100);
	if (!a || what < 6) {
		for (int i = 0; i < MAX_ARENAS; i++)
			if (!arenas[i].at) {
				map_new(&arenas[i], kinds[rnd(sizeof(kinds) - 1)]);
				return;
			}
		if (!a)
			return;
	}
	size_t first = rnd(a->pages), n = 1 + rnd(a->pages - first);
	if (n > 64 && rnd(4))
		n = 1 + rnd(16);
	if (what < 35) {
		a->at[first * PAGE + rnd(PAGE)] ^= 1;
		wrote(a, first, 1);
	} else if (what < 50) {
		memset(a->at + first * PAGE, (int)rnd(256), n * PAGE);
		wrote(a, first, n);
	} else if (what < 58) {
		volatile char sum = 0;
		for (size_t i = 0; i < n; i++)
			sum += a->at[(first + i) * PAGE];
	} else if (what < 64) {
		if (read(zero_fd, a->at + first * PAGE, n * PAGE) == (ssize_t)(n * PAGE))
			wrote(a, first, n);
	} else if (what < 67) {
		if (direct_fd >= 0 && read(direct_fd, a->at + first * PAGE, PAGE) == (ssize_t)PAGE)
			wrote(a, first, 1);
		if (direct_fd >= 0)
			lseek(direct_fd, 0, SEEK_SET);
	} else if (what < 72) {
		pthread_t thread;
		struct job j = {a, first, n};
		if (!pthread_create(&thread, NULL, write_job, &j)) {
			pthread_join(thread, NULL);
			wrote(a, first, n);
		}
	} else if (what < 76) {
		pid_t pid = fork();
		if (!pid) {
			for (size_t i = 0; i < a->pages; i++)
				if (is_private(a))
					a->at[i * PAGE] = 9;
			_exit(0);
		}
		waitpid(pid, NULL, 0);
	} else if (what < 82) {
		discard(a, first, n);
	} else if (what < 85 && a->kind == 'a') { /* moved */
		char *to = mmap(NULL, a->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *at = mremap(a->at, a->pages * PAGE, a->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		if (at == MAP_FAILED) {
			/* A mapping that stands alone is not one vma any more once a part of it was locked before any
			 * of it was written (is_mergeable_anon_vma), and then does not move. */
			if (errno != EFAULT)
				fail("mremap", a);
			munmap(to, a->pages * PAGE);
			return;
		}
		a->at = at;
		a->fresh = 1;
		moves++;
		memset(a->before, 0, sizeof(a->before));
		memset(a->other, 0, sizeof(a->other));
	} else if (what < 88 && a->kind == 'a') { /* grown or shrunk */
		size_t pages = 1 + rnd(300);
		char *at = mremap(a->at, a->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
		if (at == MAP_FAILED)
			return;
		if (at != a->at) {
			moves++;
			a->fresh = 1;
			memset(a->before, 0, sizeof(a->before));
			memset(a->other, 0, sizeof(a->other));
		}
		if (pages < a->pages) {
			memset(a->written + pages, 0, MAX_PAGES - pages);
			memset(a->content + pages, 0, MAX_PAGES - pages);
			memset(a->before + pages, 0, MAX_PAGES - pages);
			memset(a->other + pages, 0, MAX_PAGES - pages);
		}
		a->fresh |= pages > a->pages ? 2 : 0;
		a->at = at;
		a->pages = pages;
	} else if (what < 90 && strchr("asfg", a->kind)) { /* replaced in place, and what was of a file or shared
							     * loses its contents even where no entry holds them */
		if (a->kind != 'a' && !a->fresh)
			memset(a->other, 1, a->pages);
		a->kind = 'a';
		mmap(a->at, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		small_pages(a->at, a->pages);
		memset(a->written, 0, sizeof(a->written));
		memset(a->content, 0, sizeof(a->content));
		a->fresh = 1;
	} else if (what < 93) {
		mprotect(a->at, a->pages * PAGE, PROT_READ);
		if (rnd(2))
			mprotect(a->at, a->pages * PAGE, PROT_NONE);
		mprotect(a->at, a->pages * PAGE, PROT_READ | PROT_WRITE);
	} else if (what < 95) {
		if (!mlock(a->at + first * PAGE, n * PAGE)) {
			munlock(a->at + first * PAGE, n * PAGE);
			/* populated by a write fault where private and writable: written with zeros, or unchanged */
			if (is_private(a))
				wrote(a, first, n);
		}
	} else if (what < 97) {
		deep((int)rnd(60));
	} else if (a->kind != 'b') {
		munmap(a->at, a->pages * PAGE);
		memset(a, 0, sizeof(*a));
	}
}

static void report(void)
{
	printf("M %d\n", moves);
	moves = 0;
	for (int i = 0; i < MAX_ARENAS; i++) {
		struct arena *a = &arenas[i];
		if (!a->at)
			continue;
		printf("A %lx %zu %c %d\n", (unsigned long)a->at, a->pages, a->kind, a->fresh);
		for (size_t p = 0; p < a->pages;) {
			size_t n = 0;
			while (p + n < a->pages &&
			       (a->written[p + n] || a->other[p + n] || (a->before[p + n] && !a->content[p + n])))
				n++;
			if (n)
				printf("W %lx %zu\n", (unsigned long)(a->at + p * PAGE), n);
			p += n ? n : 1;
		}
		memset(a->written, 0, sizeof(a->written));
		memset(a->other, 0, sizeof(a->other));
		memcpy(a->before, a->content, sizeof(a->before));
		a->fresh = 0;
	}
	if (stack_low) {
		uintptr_t low = (uintptr_t)stack_low & ~(PAGE - 1);
		printf("W %lx %lu\n", low, (((uintptr_t)stack_high & ~(PAGE - 1)) - low) / PAGE);
	}
	stack_low = stack_high = NULL;
}

static void *writer(void *arg)
{
	uint64_t mine = (uint64_t)(uintptr_t)arg * 0x9e3779b97f4a7c15ull | 1;
	while (!halt) {
		mine ^= mine << 13;
		mine ^= mine >> 7;
		mine ^= mine << 17;
		struct arena *a = &arenas[mine % MAX_ARENAS];
		if (a->at)
			((volatile char *)a->at)[(mine >> 8) % (a->pages * PAGE)] += 1;
		if (mine % 4 == 0)
			usleep(50);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	char line[256], name[] = "/tmp/pl-oracle-XXXXXX";
	uint64_t seed;
	unsigned long count;
	pthread_t threads[16];
	unsigned long running = 0;
	FILE *setting = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
	if (setting) {
		huge_always = fgets(line, sizeof(line), setting) && strstr(line, "[always]");
		fclose(setting);
	}
	for (int i = 1; i < argc; i++) {
		huge_ok &= strcmp(argv[i], "nohuge") != 0;
		forget_dropped |= strcmp(argv[i], "dropped") == 0;
	}
	setvbuf(stdout, NULL, _IOFBF, 1 << 16);
	zero_fd = open("/dev/zero", O_RDONLY);
	file_fd = mkstemp(name);
	direct_fd = open(name, O_RDONLY | O_DIRECT);
	unlink(name);
	char *text = malloc(MAX_PAGES * PAGE);
	memset(text, 'x', MAX_PAGES * PAGE);
	if (write(file_fd, text, MAX_PAGES * PAGE) != (ssize_t)(MAX_PAGES * PAGE))
		return 1;
	fsync(file_fd);
	free(text);
	printf("%d\n", getpid());
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "go %lu %lu", &seed, &count) == 2) {
			state = seed * 0x9e3779b97f4a7c15ull + 88172645463325252ull;
			for (unsigned long i = 0; i < count; i++)
				operation();
			report();
		} else if (sscanf(line, "fill %lu %lu", &seed, &count) == 2) {
			halt = 0;
			for (running = 0; running < count && running < 16; running++)
				pthread_create(&threads[running], NULL, writer, (void *)(uintptr_t)(seed + running));
		} else if (!strncmp(line, "halt", 4)) {
			halt = 1;
			for (unsigned long i = 0; i < running; i++)
				pthread_join(threads[i], NULL);
			running = 0;
		}
		printf(".\n");
		fflush(stdout);
	}
	return 0;
}
