/* Questions of the paging lab that need a process of their own: what looking up a vma costs as vmas grow, by
 * the kernel's tree and by a list; and at how many vmas mmap fails. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct area {
	uintptr_t start, end;
	struct area *next;
};

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static struct area *walk(struct area *list, uintptr_t addr)
{
	while (list && list->end <= addr)
		list = list->next;
	return list;
}

static unsigned long next(unsigned long *state)
{
	*state = *state * 6364136223846793005ul + 1442695040888963407ul;
	return *state >> 33;
}

/* n vmas: every other page of one mapping is read-only. */
static void measure(size_t n, long calls)
{
	char *base = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct area *areas = malloc(n * sizeof(*areas));
	unsigned long state = 1, sum = 0;
	double tree, list, call;
	long steps = calls / (long)(n / 64 + 1) + 64;

	for (size_t i = 1; i < n; i += 2)
		if (mprotect(base + i * 4096, 4096, PROT_READ))
			exit(1);
	for (size_t i = 0; i < n; i++)
		areas[i] = (struct area){ (uintptr_t)base + i * 4096, (uintptr_t)base + (i + 1) * 4096,
					  i + 1 < n ? &areas[i + 1] : NULL };
	/* msync(MS_ASYNC) looks up the vma and does nothing else; with a wrong flag it does not even that. */
	tree = now();
	for (long i = 0; i < calls; i++)
		msync(base + next(&state) % n * 4096, 4096, MS_ASYNC);
	tree = now() - tree;
	call = now();
	for (long i = 0; i < calls; i++)
		sum += msync(base + next(&state) % n * 4096, 4096, MS_ASYNC | MS_SYNC);
	call = now() - call;
	list = now();
	for (long i = 0; i < steps; i++)
		sum += walk(areas, (uintptr_t)base + next(&state) % n * 4096)->start;
	list = now() - list;
	printf("cost %zu %.1f %.1f %.1f %lu\n", n, tree / calls, call / calls, list / steps, sum & 1);
	munmap(base, n * 4096);
	free(areas);
}

/* Maps single pages that cannot merge until mmap fails. */
static void limit(void)
{
	const size_t most = 4 << 20;
	char *base = mmap(NULL, most * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t made = 0;
	char line[512];
	int vmas = 0;

	while (made < most / 2 && !mprotect(base + (2 * made + 1) * 4096, 4096, PROT_READ))
		made++;
	int error = errno;

	void *one = mmap(NULL, 4096, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	void *last = mmap(NULL, 4096, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int after = last == MAP_FAILED ? errno : 0;

	FILE *maps = fopen("/proc/self/maps", "r");

	while (maps && fgets(line, sizeof(line), maps))
		vmas += !strstr(line, "[vsyscall]");
	printf("limit %zu %s %d %s %s\n", made, error == ENOMEM ? "ENOMEM" : strerror(error), vmas,
	       one == MAP_FAILED ? "refused" : "mapped", after == ENOMEM ? "ENOMEM" : after ? strerror(after) : "mapped");
}

int main(int argc, char **argv)
{
	long calls = argc > 1 ? atol(argv[1]) : 200000;

	for (size_t n = 16; n <= 16384; n *= 32)
		measure(n, calls);
	measure(60000, calls);
	limit();
	return 0;
}
