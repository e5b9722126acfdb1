/* What inject.c and inject_frame.c share: looking at a stopped thread, and the signal frame below its stack. */
#ifndef PL_INJECT_FRAME_H
#define PL_INJECT_FRAME_H
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <unistd.h>

#include "inject.h"

#define PL_MAX_XSTATE 16384

static inline long pl_trace(long request, pid_t tid, unsigned long addr, void *data)
{
	return syscall(SYS_ptrace, request, tid, addr, data);
}

static inline int pl_copy_from(pid_t tid, void *to, uint64_t from, size_t size)
{
	struct iovec local = {to, size}, remote = {(void *)(uintptr_t)from, size};
	return process_vm_readv(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -1;
}

static inline int pl_copy_to(pid_t tid, uint64_t to, void *from, size_t size)
{
	struct iovec local = {from, size}, remote = {(void *)(uintptr_t)to, size};
	return process_vm_writev(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -1;
}

/* Is there room for `need` bytes below the stack pointer that nobody else uses? */
int pl_stack_is_safe(struct pl_inject *req, const struct user_regs_struct *regs, uint64_t need);
/* Is it between the instructions of a restartable sequence? */
int pl_in_rseq(struct pl_inject *req, uint64_t ip);
/* Puts the thread's whole state, with this signal mask, below its stack; returns where rsp must point, or 0 (errno). */
uint64_t pl_write_frame(struct pl_inject *req, const struct user_regs_struct *orig, uint64_t mask);
#endif
