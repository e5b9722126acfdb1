/* The barrier over everything that can be written, from inside (CASES 7): every writable private mapping but
 * the stacks and what the barrier itself and the kernel need to write.
 *
 * Found in /proc/self/maps, never guessed: a range with holes would give ENOMEM, and the heap starts where maps
 * says. Left out, each for its reason: stacks (the handler's frame must be pushed somewhere, and a read-only
 * stack kills the process in the kernel); the pages of thread control blocks (the kernel writes rseq and the
 * robust list there, and a failed write is a fatal signal); this library's own data and bitmaps.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "barrier_stacks.h"
#include "pagelens.h"

#define MAX_MAPS (1 << 20)

int pl_barrier_install(void);
int pl_barrier_add(uintptr_t start, size_t pages, int prot, uint64_t *bitmap);
int pl_barrier_protect(uintptr_t start);
long pl_barrier_collect(uintptr_t start, uint64_t *out);
int pl_barrier_drop(uintptr_t start);

static char text[MAX_MAPS]; /* .bss of this library: one of the mappings that are left out */
static struct { uintptr_t start; size_t pages; uint64_t *bits, *out; } watched[1024];
static int n_watched;
static struct pl_part stacks[8192];
static int n_stacks, n_alternates;

PL_EXPORT long pl_barrier_everything(void);
PL_EXPORT long pl_barrier_list(void (*each)(uintptr_t page, void *arg), void *arg);
PL_EXPORT void pl_barrier_end(void);

static int holds(uintptr_t start, uintptr_t end, const void *pointer)
{
	return (uintptr_t)pointer >= start && (uintptr_t)pointer < end;
}

static int add(uintptr_t start, uintptr_t end)
{
	if (start >= end)
		return 0;
	for (int i = 0; i < n_alternates; i++) /* what lies around an alternate stack is memory like any */
		if (stacks[i].start < end && stacks[i].end > start) {
			int failed = add(start, stacks[i].start < start ? start : stacks[i].start);
			return failed ? failed : add(stacks[i].end, end);
		}
	if (n_watched == 1024)
		return -ENOSPC;
	watched[n_watched].start = start;
	watched[n_watched].pages = (end - start) / 4096;
	n_watched++;
	return 0;
}

static int somebody_stands_in(uintptr_t start, uintptr_t end)
{
	for (int i = n_alternates; i < n_stacks; i++)
		if (stacks[i].start >= start && stacks[i].start < end)
			return 1;
	return 0;
}

/* Protects; returns the pages watched, or -errno. */
PL_EXPORT long pl_barrier_everything(void)
{
	long total = 0, got, size = 0;
	int here, fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC), failed = pl_barrier_install();
	if (fd < 0 || failed)
		return fd < 0 ? -errno : failed;
	while ((got = read(fd, text + size, sizeof(text) - 1 - (size_t)size)) > 0)
		size += got;
	close(fd);
	text[size] = 0;
	uintptr_t thread_block;
	__asm__("mov %%fs:0, %0" : "=r"(thread_block)); /* the block's first word points at itself */
	n_watched = 0;
	n_stacks = pl_stacks_of_threads(stacks, 8192, &n_alternates);
	uintptr_t guard = 0; /* where the mapping before ended, if it was one without access */
	for (char *line = text, *next; line && *line; line = next) {
		next = strchr(line, '\n');
		if (next)
			*next++ = 0;
		unsigned long start, end, offset, inode;
		char perms[5], dev[16];
		int name = 0;
		if (sscanf(line, "%lx-%lx %4s %lx %15s %lu %n", &start, &end, perms, &offset, dev, &inode, &name) < 6)
			continue;
		int above_guard = guard == start;
		guard = perms[0] == '-' && perms[1] == '-' ? end : 0;
		if (perms[0] != 'r' || perms[1] != 'w' || perms[3] != 'p' || !strncmp(line + name, "[stack", 6))
			continue;
		if (holds(start, end, &here) || holds(start, end, (void *)thread_block) ||
		    holds(start, end, text) || holds(start, end, watched) || holds(start, end, &n_watched) ||
		    holds(start, end, stacks))
			continue;
		if (strstr(line + name, "libpagelens"))
			continue;
		uintptr_t stack_end = above_guard ? pl_stack_of_libc(start, end) : 0;
		if (stack_end)
			start = stack_end; /* the rest is another mapping that the kernel has merged with it */
		else if (somebody_stands_in(start, end))
			continue;
		if ((failed = add(start, end)))
			return failed;
	}
	/* Bitmaps from mmap: new mappings, which are not in the list. */
	for (int i = 0; i < n_watched; i++) {
		size_t bytes = (watched[i].pages + 63) / 64 * 8;
		char *bits = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (bits == MAP_FAILED)
			return -errno;
		watched[i].bits = (uint64_t *)bits;
		watched[i].out = (uint64_t *)(bits + bytes);
	}
	for (int i = 0; i < n_watched; i++) {
		failed = pl_barrier_add(watched[i].start, watched[i].pages, PROT_READ | PROT_WRITE, watched[i].bits);
		if (!failed)
			failed = pl_barrier_protect(watched[i].start);
		if (failed)
			return failed;
		total += (long)watched[i].pages;
	}
	return total;
}

/* each(page, arg) for every page written since; protects them again. Returns how many. `each` may write where
 * it likes: such writes belong to the next list. */
PL_EXPORT long pl_barrier_list(void (*each)(uintptr_t page, void *arg), void *arg)
{
	long total = 0;
	for (int i = 0; i < n_watched; i++) {
		long n = pl_barrier_collect(watched[i].start, watched[i].out);
		if (n < 0)
			return n;
		total += n;
	}
	for (int i = 0; each && i < n_watched; i++)
		for (size_t page = 0; page < watched[i].pages; page++)
			if (watched[i].out[page / 64] >> (page % 64) & 1)
				each(watched[i].start + page * 4096, arg);
	return total;
}

PL_EXPORT void pl_barrier_end(void)
{
	for (int i = 0; i < n_watched; i++)
		pl_barrier_drop(watched[i].start);
	n_watched = 0;
}
