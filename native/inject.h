/* Requests of native/inject.c; mirrored by src/pagelens/linux/inject.py. */
#ifndef PL_INJECT_H
#define PL_INJECT_H
#include <stdint.h>
#include <sys/types.h>

#include "pagelens.h"

enum { /* where a test may kill us */
	PL_STAGE_SEIZED = 1, PL_STAGE_STOPPED, PL_STAGE_FRAME, PL_STAGE_REGS, PL_STAGE_MASK, PL_STAGE_ENTRY,
	PL_STAGE_EXIT, PL_STAGE_TAKEN, PL_STAGE_UNMASK, PL_STAGE_BACK
};

enum {
	PL_REFUSED_SEIZE = 1, PL_REFUSED_NO_STOP, PL_REFUSED_GONE, PL_REFUSED_32BIT, PL_REFUSED_RSEQ,
	PL_REFUSED_STACK, PL_REFUSED_FRAME, PL_REFUSED_CALL,
	PL_REFUSED_IMAGE /* exec since the addresses were looked up: their code is not there */
};

struct pl_call {
	int64_t nr;
	uint64_t args[6];
	int64_t ret;       /* as the kernel returns it: -errno on failure */
	int32_t done;
	int32_t take_fd;   /* bring the descriptor that it returns here (pidfd_getfd) */
	int32_t fd;        /* ours, or -1 */
	int32_t fd_errno;
	int32_t arg0_from; /* take args[0] from that call's result; skip if it failed. -1: no */
	int32_t pad;
};

struct pl_inject_vma { /* a writable private vma that may hold a stack */
	uint64_t start, end;
	int64_t main_stack;
};

struct pl_inject {
	int32_t pid, tid, pidfd, n_vmas;
	uint64_t gadget;    /* of `syscall; ret` */
	uint64_t sigreturn; /* of `mov $15, %eax; syscall`, or 0 */
	uint64_t pop_rax;   /* of `pop %rax; ret`, where sigreturn is 0 */
	const struct pl_inject_vma *vmas;
	struct pl_call *calls;
	int64_t deadline_ns; /* CLOCK_MONOTONIC */
	int64_t held_ns;     /* from the interrupt to the release */
	int32_t n_calls, die_at, stage, refused, error, restarted;
};

/* For a thread in a PTRACE_INTERRUPT stop: a call that the kernel ended with EINTR at that stop is made again. */
void pl_undo_eintr(pid_t tid);
PL_EXPORT int pl_inject(struct pl_inject *req);
PL_EXPORT int pl_inject_held(struct pl_inject *req);
#endif
