/* Call stacks out of registers and a copy of the top of the stack, by the .eh_frame of the program's files.
 *
 * libdw (elfutils) does the DWARF; it is opened at run time, so that the C core needs libc only and a machine
 * without it only loses these stacks. Rejected: our own CFI interpreter; one callback into Python per word read.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pagelens.h"

#define REGS 17 /* DWARF numbers of x86-64: rax rdx rcx rbx rsi rdi rbp rsp r8-r15 rip */
#define SP 7

/* What libdwfl.h declares; its structures are opaque to us but for these two tables of callbacks. */
struct callbacks {
	int (*find_elf)(void *mod, void **user, const char *name, uint64_t base, char **file, void **elf);
	int (*find_debuginfo)(void *mod, void **user, const char *name, uint64_t base, const char *file,
			      const char *link, uint32_t crc, char **found);
	int (*section_address)(void *mod, void **user, const char *name, uint64_t base, const char *section,
			       uint32_t index, const void *header, uint64_t *addr);
	char **debuginfo_path;
};

struct thread_callbacks {
	int (*next_thread)(void *dwfl, void *arg, void **thread_arg);
	bool (*get_thread)(void *dwfl, int tid, void *arg, void **thread_arg);
	bool (*memory_read)(void *dwfl, uint64_t addr, uint64_t *result, void *arg);
	bool (*set_initial_registers)(void *thread, void *arg);
	void (*detach)(void *dwfl, void *arg);
	void (*thread_detach)(void *thread, void *arg);
};

static struct {
	void *(*begin)(const struct callbacks *);
	void (*end)(void *);
	int (*maps_report)(void *, FILE *);
	int (*report_end)(void *, void *, void *);
	bool (*attach)(void *, void *, int, const struct thread_callbacks *, void *);
	int (*frames)(void *, int, int (*)(void *, void *), void *);
	bool (*pc)(void *, uint64_t *, bool *);
	bool (*registers)(void *, int, unsigned int, const uint64_t *);
	int loaded; /* 1 yes, -1 no */
} dw;

struct pl_unwind {
	void *dwfl;
	const uint64_t *regs;
	const unsigned char *stack;
	uint64_t length;
	uint64_t *frames;
	unsigned int count, max;
	int missed; /* a word beyond the copy was wanted: libdw then reports an ordinary end */
};

static int load(void)
{
	void *lib;

	if (dw.loaded)
		return dw.loaded;
	dw.loaded = -1;
	lib = dlopen("libdw.so.1", RTLD_NOW | RTLD_LOCAL);
	if (!lib)
		return -1;
#define FIND(member, symbol)                                                                                           \
	do {                                                                                                           \
		void *found = dlsym(lib, symbol);                                                                      \
		if (!found)                                                                                            \
			return -1;                                                                                     \
		memcpy(&dw.member, &found, sizeof found);                                                              \
	} while (0)
	FIND(begin, "dwfl_begin");
	FIND(end, "dwfl_end");
	FIND(maps_report, "dwfl_linux_proc_maps_report");
	FIND(report_end, "dwfl_report_end");
	FIND(attach, "dwfl_attach_state");
	FIND(frames, "dwfl_getthread_frames");
	FIND(pc, "dwfl_frame_pc");
	FIND(registers, "dwfl_thread_state_registers");
#undef FIND
	return dw.loaded = 1;
}

static int find_elf(void *mod, void **user, const char *name, uint64_t base, char **file, void **elf)
{
	int fd = -1;

	(void)mod, (void)user, (void)base, (void)elf;
	if (name[0] == '/')
		fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		*file = strdup(name);
	return fd;
}

/* .eh_frame is in the file itself; a search for separate debug files would be slow and gains nothing here. */
static int no_debuginfo(void *mod, void **user, const char *name, uint64_t base, const char *file, const char *link,
			uint32_t crc, char **found)
{
	(void)mod, (void)user, (void)name, (void)base, (void)file, (void)link, (void)crc, (void)found;
	return -1;
}

static int next_thread(void *dwfl, void *arg, void **thread_arg)
{
	(void)dwfl;
	if (*thread_arg)
		return 0;
	*thread_arg = arg;
	return 1;
}

static bool get_thread(void *dwfl, int tid, void *arg, void **thread_arg)
{
	(void)dwfl, (void)tid;
	*thread_arg = arg;
	return true;
}

static bool memory_read(void *dwfl, uint64_t addr, uint64_t *result, void *arg)
{
	struct pl_unwind *u = arg;
	uint64_t at = addr - u->regs[SP];

	(void)dwfl;
	if (addr < u->regs[SP] || at + 8 > u->length) {
		u->missed = 1;
		return false;
	}
	memcpy(result, u->stack + at, 8);
	return true;
}

static bool set_registers(void *thread, void *arg)
{
	const struct pl_unwind *u = arg;

	return dw.registers(thread, 0, REGS, u->regs);
}

static int frame(void *state, void *arg)
{
	struct pl_unwind *u = arg;
	uint64_t pc;
	bool activation;

	if (!dw.pc(state, &pc, &activation) || u->count == u->max)
		return 1; /* DWARF_CB_ABORT */
	u->frames[u->count++] = pc;
	return 0;
}

static const struct callbacks elf_callbacks = {.find_elf = find_elf, .find_debuginfo = no_debuginfo};
static const struct thread_callbacks thread_callbacks = {
	.next_thread = next_thread,
	.get_thread = get_thread,
	.memory_read = memory_read,
	.set_initial_registers = set_registers,
};

PL_EXPORT int pl_unwind_available(void);
PL_EXPORT struct pl_unwind *pl_unwind_open(const char *maps);
PL_EXPORT void pl_unwind_close(struct pl_unwind *u);
PL_EXPORT void pl_unwind(struct pl_unwind *u, const uint64_t *regs, const unsigned char *stacks,
			 const uint32_t *lengths, size_t stride, size_t n, uint64_t *frames, unsigned char max,
			 unsigned char *counts, unsigned char *complete);

PL_EXPORT int pl_unwind_available(void)
{
	return load() > 0;
}

/* maps: text in the form of /proc/PID/maps. NULL: no libdw, or no module in it. */
PL_EXPORT struct pl_unwind *pl_unwind_open(const char *maps)
{
	struct pl_unwind *u;
	FILE *f;
	int bad;

	if (load() < 0 || !(u = calloc(1, sizeof *u)))
		return NULL;
	u->dwfl = dw.begin(&elf_callbacks);
	f = u->dwfl ? fmemopen((void *)(uintptr_t)maps, strlen(maps), "r") : NULL;
	if (!f) {
		pl_unwind_close(u);
		return NULL;
	}
	bad = dw.maps_report(u->dwfl, f);
	fclose(f);
	if (bad || dw.report_end(u->dwfl, NULL, NULL) || !dw.attach(u->dwfl, NULL, 1, &thread_callbacks, u)) {
		pl_unwind_close(u);
		return NULL;
	}
	return u;
}

PL_EXPORT void pl_unwind_close(struct pl_unwind *u)
{
	if (u->dwfl)
		dw.end(u->dwfl);
	free(u);
}

/* n samples: regs[n][17]; stacks[n][stride], of which lengths[i] bytes from the stack pointer up are good.
 * Writes frames[n][max] (the instruction, then return addresses, as frame pointers give them), counts[n], complete[n] (1: the outermost frame was
 * reached, 0: cut off by the copy's end, by a missing file, or by code without .eh_frame). */
PL_EXPORT void pl_unwind(struct pl_unwind *u, const uint64_t *regs, const unsigned char *stacks,
			 const uint32_t *lengths, size_t stride, size_t n, uint64_t *frames, unsigned char max,
			 unsigned char *counts, unsigned char *complete)
{
	for (size_t i = 0; i < n; i++) {
		u->regs = regs + i * REGS;
		u->stack = stacks + i * stride;
		u->length = lengths[i];
		u->frames = frames + i * max;
		u->count = 0;
		u->max = max;
		u->missed = 0;
		complete[i] = dw.frames(u->dwfl, 1, frame, u) == 0 && !u->missed;
		if (!u->count && max)
			u->frames[u->count++] = u->regs[16];
		counts[i] = (unsigned char)u->count;
	}
}
