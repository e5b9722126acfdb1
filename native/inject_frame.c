/* The signal frame that brings an injected thread back when its tracer is dead, and whether there is room for it. See
 * inject.c for why.
 */
#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>

#include "inject_frame.h"

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif
#define RED_ZONE 128
#define FRAME_SIZE 440 /* pretcode, ucontext, siginfo: struct rt_sigframe of arch/x86 */
#define SCAN_UP 65536 /* how far above the stack pointer a signal frame is looked for */

/* The size and mask of the xsave area in a signal frame: fpu_user_cfg.default_size, without the AMX tile data
 * that only threads with the permission have. */
static int xsave_layout(uint32_t *size, uint64_t *mask)
{
	uint32_t a, b, c, d, xcr0_low, xcr0_high;
	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
		return -1;
	__asm__ volatile("xgetbv" : "=a"(xcr0_low), "=d"(xcr0_high) : "c"(0));
	*mask = (((uint64_t)xcr0_high << 32) | xcr0_low) & ~(UINT64_C(1) << 18);
	*size = 512 + 64;
	for (unsigned i = 2; i < 63; i++) {
		if (!(*mask >> i & 1) || !__get_cpuid_count(0xd, i, &a, &b, &c, &d))
			continue;
		if (a && b + a > *size)
			*size = b + a;
	}
	return *size + 4 > PL_MAX_XSTATE ? -1 : 0;
}

static const struct pl_inject_vma *vma_of(const struct pl_inject *req, uint64_t addr)
{
	for (int i = 0; i < req->n_vmas; i++)
		if (addr >= req->vmas[i].start && addr < req->vmas[i].end)
			return &req->vmas[i];
	return NULL;
}

/* Is there room below rsp that nobody else uses? A stack of the kernel's making ([stack]) or one with the
 * thread control block on top (glibc, musl: the first word points at itself) is; a coroutine's is not known to
 * be, and writing below it could hit its neighbour. */
int pl_stack_is_safe(struct pl_inject *req, const struct user_regs_struct *regs, uint64_t need)
{
	uint64_t sp = regs->rsp, word, bottom;
	const struct pl_inject_vma *vma = vma_of(req, sp);
	if (!vma)
		return 0;
	if (!vma->main_stack) {
		if (regs->fs_base <= sp || regs->fs_base >= vma->end)
			return 0;
		if (pl_copy_from(req->tid, &word, regs->fs_base, sizeof(word)))
			return 0;
		if (word != regs->fs_base) /* glibc: tcbhead_t.tcb; musl: struct pthread.self */
			return 0;
	}
	bottom = vma->start;
	/* In a signal handler on an alternate stack inside this vma? Its frame says where that stack ends. */
	uint64_t span = vma->end - (sp & ~7ull) < SCAN_UP ? vma->end - (sp & ~7ull) : SCAN_UP;
	uint64_t *above = malloc(span);
	if (!above)
		return 0;
	int known = pl_copy_from(req->tid, above, sp & ~7ull, span) == 0;
	for (uint64_t i = 0; known && req->sigreturn && i + 6 < span / 8; i++) {
		if (above[i] != req->sigreturn)
			continue;
		uint64_t ss_sp = above[i + 3], ss_size = above[i + 5];
		if (sp >= ss_sp && sp - ss_sp < ss_size && ss_sp > bottom)
			bottom = ss_sp;
	}
	free(above);
	return known && sp > bottom && sp - bottom > need + 4096;
}

/* Between the instructions of a restartable sequence? Then moving the thread would break its promise. */
int pl_in_rseq(struct pl_inject *req, uint64_t ip)
{
	struct { uint64_t pointer; uint32_t size, signature, flags, pad; } cfg;
	struct { uint32_t version, flags; uint64_t start, length, abort; } section;
	uint64_t cs;
	memset(&cfg, 0, sizeof(cfg));
	if (pl_trace(PTRACE_GET_RSEQ_CONFIGURATION, req->tid, sizeof(cfg), &cfg) < 0 || !cfg.pointer)
		return 0;
	if (pl_copy_from(req->tid, &cs, cfg.pointer + 8, sizeof(cs)) || !cs)
		return 0;
	if (pl_copy_from(req->tid, &section, cs, sizeof(section)))
		return 0;
	return ip - section.start < section.length;
}

static void put64(uint8_t *frame, size_t at, uint64_t value) { memcpy(frame + at, &value, 8); }
static void put32(uint8_t *frame, size_t at, uint32_t value) { memcpy(frame + at, &value, 4); }

/* What the thread must look like if the kernel restores it through rt_sigreturn: an interrupted system call is
 * made again (its remaining time is not known outside the kernel, so a timeout starts anew). */
static void as_if_restarted(struct user_regs_struct *regs)
{
	if ((long)regs->orig_rax < 0)
		return;
	switch ((long)regs->rax) {
	case -512: /* ERESTARTSYS */
	case -513: /* ERESTARTNOINTR */
	case -514: /* ERESTARTNOHAND */
		break;
	case -516: /* ERESTART_RESTARTBLOCK */
		if (regs->orig_rax == SYS_restart_syscall) { /* which call it was is no longer known */
			regs->rax = (unsigned long)-EINTR;
			return;
		}
		break;
	default:
		return;
	}
	regs->rax = regs->orig_rax;
	regs->rip -= 2;
}

/* Writes the frame; returns where rsp must point, or 0. */
uint64_t pl_write_frame(struct pl_inject *req, const struct user_regs_struct *orig, uint64_t mask)
{
	uint8_t frame[FRAME_SIZE + 16];
	uint8_t xstate[PL_MAX_XSTATE];
	struct user_regs_struct regs = *orig;
	struct iovec iov = {xstate, sizeof(xstate) - 8};
	uint32_t size;
	uint64_t features, in_use;

	if (xsave_layout(&size, &features)) {
		errno = ENOTSUP;
		return 0;
	}
	memset(xstate, 0, sizeof(xstate));
	if (pl_trace(PTRACE_GETREGSET, req->tid, NT_X86_XSTATE, &iov))
		return 0;
	memcpy(&in_use, xstate + 512, 8);
	if (in_use & ~features) { /* AMX tiles in use: the frame would lose them */
		errno = ENOTSUP;
		return 0;
	}
	memset(xstate + 464, 0, 48);
	put32(xstate, 464, 0x46505853); /* FP_XSTATE_MAGIC1 */
	put32(xstate, 468, size + 4);
	put64(xstate, 472, features);
	put32(xstate, 480, size);
	put32(xstate, size, 0x46505845); /* FP_XSTATE_MAGIC2 */

	uint64_t fp = (regs.rsp - RED_ZONE - 64 - size - 4) & ~63ull;
	uint64_t at = ((fp - FRAME_SIZE) & ~15ull) - 8;
	as_if_restarted(&regs);
	memset(frame, 0, sizeof(frame));
	uint8_t *f = frame + 16; /* two words below it for the way without a ready restorer */
	put64(f, 8, 1 | 2 | 4);  /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */
	put32(f, 32, 0x7fffffff); /* no valid ss_flags: do_sigaltstack() refuses, the alternate stack stays */
	const uint64_t gregs[17] = {regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
				    regs.rdi, regs.rsi, regs.rbp, regs.rbx, regs.rdx, regs.rax, regs.rcx,
				    regs.rsp, regs.rip};
	memcpy(f + 48, gregs, sizeof(gregs));
	put64(f, 184, regs.eflags);
	put64(f, 192, (regs.cs & 0xffff) | (regs.ss & 0xffff) << 48);
	put64(f, 232, fp);
	put64(f, 304, mask);
	if (pl_copy_to(req->tid, fp, xstate, size + 4))
		return 0;
	if (req->sigreturn) {
		put64(f, 0, req->sigreturn);
		return pl_copy_to(req->tid, at, f, FRAME_SIZE) ? 0 : at;
	}
	put64(f, 0, req->gadget); /* pop rax (15); ret; syscall */
	put64(frame, 0, req->pop_rax);
	put64(frame, 8, SYS_rt_sigreturn);
	return pl_copy_to(req->tid, at - 16, frame, FRAME_SIZE + 16) ? 0 : at - 16;
}
