/* Ways to give pages away and keep (or not) the range: what is left, what a later read sees. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define PAGES 64
static sigjmp_buf jump;

static void on_segv(int sig)
{
	(void)sig;
	siglongjmp(jump, 1);
}

static int resident(const char *p)
{
	static uint64_t map[PAGES];
	int fd = open("/proc/self/pagemap", O_RDONLY), n = 0;

	if (fd < 0 || pread(fd, map, sizeof(map), (uintptr_t)p / 4096 * 8) != sizeof(map))
		_exit(3);
	close(fd);
	for (int i = 0; i < PAGES; i++)
		n += map[i] >> 63;
	return n;
}

static void report(const char *name, volatile char *p, int before)
{
	struct rusage a, b;
	int left = resident((const char *)p);
	const char *what;
	volatile int faults = 0;

	if (!sigsetjmp(jump, 1)) {
		getrusage(RUSAGE_SELF, &a);
		char c = p[0];

		for (int i = 1; i < PAGES; i++)
			c |= p[i * 4096];
		getrusage(RUSAGE_SELF, &b);
		what = c == 5 ? "old" : c == 0 ? "zeros" : "mixed";
		faults = b.ru_minflt - a.ru_minflt + b.ru_majflt - a.ru_majflt;
	} else {
		what = "SIGSEGV";
	}
	printf("way %s %d %d %s %d\n", name, before, left, what, faults);
}

int main(void)
{
	static const struct { const char *name; int advice; } ways[] = {
		{ "MADV_DONTNEED", MADV_DONTNEED }, { "MADV_FREE", MADV_FREE }, { "MADV_COLD", 20 },
		{ "MADV_PAGEOUT", 21 },
	};
	struct sigaction act = { .sa_handler = on_segv, .sa_flags = SA_NODEFER };
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS;

	sigaction(SIGSEGV, &act, NULL);
	setvbuf(stdout, malloc(65536), _IOFBF, 65536);
	printf("warm\n");
	resident(mmap(NULL, PAGES * 4096, 3, flags, -1, 0));
	for (int i = 0; i < 7; i++) {
		char *p = mmap(NULL, PAGES * 4096, 3, flags | (i == 4 ? MAP_NORESERVE : 0), -1, 0);
		int before;

		for (int k = 0; k < PAGES; k++)
			p[k * 4096] = 5;
		before = resident(p);
		if (i < 4) {
			madvise(p, PAGES * 4096, ways[i].advice);
			report(ways[i].name, p, before);
		} else if (i == 4) {
			report("MAP_NORESERVE", p, before);
		} else if (i == 5) {
			mmap(p, PAGES * 4096, 3, flags | MAP_FIXED, -1, 0);
			report("mmap-over", p, before);
		} else {
			munmap(p, PAGES * 4096);
			report("munmap", p, before);
		}
	}
	fflush(stdout);
	return 0;
}
