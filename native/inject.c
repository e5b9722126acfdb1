/* Remote system calls: let a thread of another process make a few system calls, and be gone.
 *
 * The rule is that the tracer may be killed (SIGKILL) between any two of its steps and the target goes on as
 * if nothing had happened. So nothing is ever written into the target's code, and before its registers change,
 * its whole state lies on its own stack, below the red zone, as the signal frame that rt_sigreturn expects.
 * The thread is then sent to a `syscall; ret` that its own code already holds. If we live, we stop it when the
 * call is done and put its registers back; if we die, the `ret` takes it to an rt_sigreturn that its own code
 * already holds, and the kernel restores the state from the frame.
 *
 * Rejected: PTRACE_SINGLESTEP (a tracer that dies leaves the trap flag set, and the next SIGTRAP kills the
 * target: exit_ptrace() does not call ptrace_disable()); writing a breakpoint or code (outlives us); moving to
 * a scratch page by remote mmap (left behind if we die).
 *
 * All ptrace requests come from a thread made for this one job: when it ends, exit_ptrace() lets go of
 * whatever it still held, so that even a target that never stopped in time is released.
 */
#include <cpuid.h>
#include <errno.h>
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "inject.h"

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif
#define PL_GETSIGMASK 0x420a
#define PL_SETSIGMASK 0x420b
#define PL_GET_SYSCALL_INFO 0x420e
#define PL_EVENT_STOP 128
#define RED_ZONE 128
#define FRAME_SIZE 440 /* pretcode, ucontext, siginfo: struct rt_sigframe of arch/x86 */
#define MAX_XSTATE 16384
#define SCAN_UP 65536 /* how far above the stack pointer a signal frame is looked for */

static int64_t now_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* For the tests: die here, as by `kill -9`. */
static void stage(struct pl_inject *req, int number)
{
	req->stage = number;
	if (req->die_at == number)
		syscall(SYS_kill, getpid(), SIGKILL);
}

static long trace(long request, pid_t tid, unsigned long addr, void *data)
{
	return syscall(SYS_ptrace, request, tid, addr, data);
}

static int copy_from(pid_t tid, void *to, uint64_t from, size_t size)
{
	struct iovec local = {to, size}, remote = {(void *)(uintptr_t)from, size};
	return process_vm_readv(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -1;
}

static int copy_to(pid_t tid, uint64_t to, void *from, size_t size)
{
	struct iovec local = {from, size}, remote = {(void *)(uintptr_t)to, size};
	return process_vm_writev(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -1;
}

/* The next stop of tid, or -1 (gone: ESRCH; not in time: ETIMEDOUT). */
static int next_stop(struct pl_inject *req, pid_t tid, int *status)
{
	struct timespec nap = {0, 10000};
	for (int spins = 0;; spins++) {
		siginfo_t info;
		info.si_pid = 0;
		/* Look first: the exit status of a target that is our own child belongs to who started it. */
		int failed = waitid(P_PID, (id_t)tid, &info, WSTOPPED | WEXITED | WNOWAIT | WNOHANG | __WALL);
		if ((failed && errno != EINTR) ||
		    (!failed && info.si_pid && info.si_code != CLD_TRAPPED && info.si_code != CLD_STOPPED)) {
			errno = ESRCH;
			return -1;
		}
		if (!failed && info.si_pid && waitpid(tid, status, __WALL | WNOHANG) == tid && WIFSTOPPED(*status))
			return 0;
		if (now_ns() > req->deadline_ns) {
			errno = ETIMEDOUT;
			return -1;
		}
		if (spins > 100)
			nanosleep(&nap, NULL);
	}
}

/* PTRACE_INTERRUPT, and the stop that it makes: inside get_signal(), where the kernel still has the restart of
 * an interrupted system call before it. Signals that arrive first are delivered as they would have been. */
static int interrupt(struct pl_inject *req, int resume)
{
	int status;
	if (trace(PTRACE_INTERRUPT, req->tid, 0, NULL))
		return -1;
	if (resume && trace(PTRACE_CONT, req->tid, 0, NULL))
		return -1;
	for (;;) {
		if (next_stop(req, req->tid, &status))
			return -1;
		if (status >> 16 == PL_EVENT_STOP)
			return 0;
		unsigned long sig = status >> 16 ? 0 : (unsigned long)WSTOPSIG(status);
		if (sig == (SIGTRAP | 0x80))
			sig = 0;
		if (trace(PTRACE_CONT, req->tid, 0, (void *)sig))
			return -1;
	}
}

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
	return *size + 4 > MAX_XSTATE ? -1 : 0;
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
static int stack_is_safe(struct pl_inject *req, const struct user_regs_struct *regs, uint64_t need)
{
	uint64_t sp = regs->rsp, word, bottom;
	const struct pl_inject_vma *vma = vma_of(req, sp);
	if (!vma)
		return 0;
	if (!vma->main_stack) {
		if (regs->fs_base <= sp || regs->fs_base >= vma->end)
			return 0;
		if (copy_from(req->tid, &word, regs->fs_base, sizeof(word)))
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
	int known = copy_from(req->tid, above, sp & ~7ull, span) == 0;
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
static int in_rseq(struct pl_inject *req, uint64_t ip)
{
	struct { uint64_t pointer; uint32_t size, signature, flags, pad; } cfg;
	struct { uint32_t version, flags; uint64_t start, length, abort; } section;
	uint64_t cs;
	memset(&cfg, 0, sizeof(cfg));
	if (trace(PTRACE_GET_RSEQ_CONFIGURATION, req->tid, sizeof(cfg), &cfg) < 0 || !cfg.pointer)
		return 0;
	if (copy_from(req->tid, &cs, cfg.pointer + 8, sizeof(cs)) || !cs)
		return 0;
	if (copy_from(req->tid, &section, cs, sizeof(section)))
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

/* Calls that the kernel ends with EINTR at any stop, handler or not (signal(7)); nobody sent the target a
 * signal, so it shall not see one. */
static int ends_with_eintr(long nr)
{
	switch (nr) {
	case SYS_epoll_wait:
	case SYS_epoll_pwait:
	case 441: /* epoll_pwait2 */
	case SYS_semop:
	case SYS_semtimedop:
	case SYS_io_getevents:
	case 333: /* io_pgetevents */
	case SYS_rt_sigtimedwait:
	case 426: /* io_uring_enter: what it had submitted would be its result instead */
	case SYS_read: /* of a socket with SO_RCVTIMEO; likewise below */
	case SYS_readv:
	case SYS_recvfrom:
	case SYS_recvmsg:
	case SYS_write:
	case SYS_writev:
	case SYS_sendto:
	case SYS_sendmsg:
	case SYS_accept:
	case SYS_accept4:
		return 1;
	default:
		return 0;
	}
}

static int signal_pending_unblocked(pid_t tid, uint64_t blocked)
{
	for (unsigned shared = 0; shared < 2; shared++) {
		struct { uint64_t off; uint32_t flags; int32_t nr; } arg = {0, shared, 32};
		siginfo_t infos[32];
		long n = trace(PTRACE_PEEKSIGINFO, tid, (unsigned long)(uintptr_t)&arg, infos);
		for (long i = 0; i < n; i++)
			if (!(blocked >> (infos[i].si_signo - 1) & 1))
				return 1;
	}
	return 0;
}

/* Writes the frame; returns where rsp must point, or 0. */
static uint64_t write_frame(struct pl_inject *req, const struct user_regs_struct *orig, uint64_t mask)
{
	uint8_t frame[FRAME_SIZE + 16];
	uint8_t xstate[MAX_XSTATE];
	struct user_regs_struct regs = *orig;
	struct iovec iov = {xstate, sizeof(xstate) - 8};
	uint32_t size;
	uint64_t features, in_use;

	if (xsave_layout(&size, &features)) {
		errno = ENOTSUP;
		return 0;
	}
	memset(xstate, 0, sizeof(xstate));
	if (trace(PTRACE_GETREGSET, req->tid, NT_X86_XSTATE, &iov))
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
	if (copy_to(req->tid, fp, xstate, size + 4))
		return 0;
	if (req->sigreturn) {
		put64(f, 0, req->sigreturn);
		return copy_to(req->tid, at, f, FRAME_SIZE) ? 0 : at;
	}
	put64(f, 0, req->gadget); /* pop rax (15); ret; syscall */
	put64(frame, 0, req->pop_rax);
	put64(frame, 8, SYS_rt_sigreturn);
	return copy_to(req->tid, at - 16, frame, FRAME_SIZE + 16) ? 0 : at - 16;
}

/* Resume until the next system-call stop of the wanted kind (1 entry, 2 exit). */
static int to_syscall_stop(struct pl_inject *req, int kind)
{
	int status;
	uint8_t info[128];
	unsigned long sig = 0;
	for (;;) {
		if (trace(PTRACE_SYSCALL, req->tid, 0, (void *)sig))
			return -1;
		if (next_stop(req, req->tid, &status))
			return -1;
		sig = 0;
		if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
			memset(info, 0, sizeof(info));
			if (trace(PL_GET_SYSCALL_INFO, req->tid, sizeof(info), info) < 0)
				return -1;
			if (info[0] == kind)
				return 0;
		} else if (!(status >> 16)) {
			sig = (unsigned long)WSTOPSIG(status); /* only SIGSTOP and SIGKILL come through the mask */
		}
	}
}

static int one_call(struct pl_inject *req, const struct user_regs_struct *orig, uint64_t sp, struct pl_call *call)
{
	struct user_regs_struct regs = *orig;
	uint64_t all = ~UINT64_C(0);
	regs.rip = req->gadget;
	regs.rsp = sp;
	regs.rax = call->nr;
	regs.orig_rax = ~0ul;
	regs.rdi = call->args[0];
	regs.rsi = call->args[1];
	regs.rdx = call->args[2];
	regs.r10 = call->args[3];
	regs.r8 = call->args[4];
	regs.r9 = call->args[5];
	regs.eflags &= ~0x500ul; /* TF, DF */
	if (trace(PTRACE_SETREGS, req->tid, 0, &regs))
		return -1;
	stage(req, PL_STAGE_REGS);
	/* Only now: until here nothing has changed that the frame does not bring back. */
	if (trace(PL_SETSIGMASK, req->tid, 8, &all))
		return -1;
	stage(req, PL_STAGE_MASK);
	if (to_syscall_stop(req, 1))
		return -1;
	stage(req, PL_STAGE_ENTRY);
	if (trace(PTRACE_GETREGS, req->tid, 0, &regs))
		return -1;
	if (regs.rip != req->gadget + 2 || regs.orig_rax != (unsigned long)call->nr) {
		errno = EPROTO;
		return -1;
	}
	if (to_syscall_stop(req, 2) || trace(PTRACE_GETREGS, req->tid, 0, &regs))
		return -1;
	call->ret = (long)regs.rax;
	call->done = 1;
	stage(req, PL_STAGE_EXIT);
	return 0;
}

static int run_calls(struct pl_inject *req, const struct user_regs_struct *orig, uint64_t sp)
{
	for (int i = 0; i < req->n_calls; i++) {
		struct pl_call *call = &req->calls[i];
		if (call->arg0_from >= 0) {
			const struct pl_call *before = &req->calls[call->arg0_from];
			if (!before->done || before->ret < 0)
				continue;
			call->args[0] = (uint64_t)before->ret;
		}
		if (one_call(req, orig, sp, call))
			return -1;
		if (call->take_fd && call->ret >= 0) {
			call->fd = (int)syscall(SYS_pidfd_getfd, req->pidfd, (int)call->ret, 0);
			call->fd_errno = call->fd < 0 ? errno : 0;
			stage(req, PL_STAGE_TAKEN);
		}
	}
	return 0;
}

/* req->tid is in a PTRACE_EVENT_STOP of this thread. Leaves it in a stop with its own registers back, or
 * returns -1: then the caller must let go and the frame does the rest. */
static int calls_in_stop(struct pl_inject *req)
{
	struct user_regs_struct regs, back;
	uint64_t mask, sp;
	if (trace(PTRACE_GETREGS, req->tid, 0, &regs))
		return -1;
	if (regs.cs != 0x33) {
		req->refused = PL_REFUSED_32BIT;
		return 0;
	}
	if (in_rseq(req, regs.rip)) {
		req->refused = PL_REFUSED_RSEQ;
		return 0;
	}
	if (!stack_is_safe(req, &regs, MAX_XSTATE / 2)) {
		req->refused = PL_REFUSED_STACK;
		return 0;
	}
	if (trace(PL_GETSIGMASK, req->tid, 8, &mask))
		return -1;
	sp = write_frame(req, &regs, mask);
	if (!sp) {
		req->error = errno;
		req->refused = PL_REFUSED_FRAME;
		return 0;
	}
	stage(req, PL_STAGE_FRAME);
	/* From here on giving up would leave a call half made (a descriptor that nobody closes): the thread is
	 * runnable, and only waits for a CPU. */
	req->deadline_ns = now_ns() + INT64_C(20000000000);
	back = regs;
	if ((long)regs.orig_rax >= 0 && (long)regs.rax == -EINTR && ends_with_eintr((long)regs.orig_rax) &&
	    !signal_pending_unblocked(req->tid, mask)) {
		back.rax = regs.orig_rax;
		back.rip -= 2;
		back.orig_rax = ~0ul;
		req->restarted = 1;
	}
	int failed = run_calls(req, &regs, sp), saved = errno;
	if (failed && (saved == ESRCH || saved == ETIMEDOUT)) {
		errno = saved;
		return -1;
	}
	if (trace(PL_SETSIGMASK, req->tid, 8, &mask))
		return -1;
	stage(req, PL_STAGE_UNMASK);
	/* An interrupted call still has its -ERESTART code and number: letting go raises TIF_SIGPENDING
	 * (ptrace_signal_wake_up), so arch_do_signal_or_restart() restarts it as it would have. */
	if (trace(PTRACE_SETREGS, req->tid, 0, &back))
		return -1;
	stage(req, PL_STAGE_BACK);
	errno = saved;
	return failed ? -1 : 0;
}

static void *job(void *arg)
{
	struct pl_inject *req = arg;
	for (int tries = 0; tries < 20; tries++) {
		req->refused = 0;
		req->error = 0;
		if (trace(PTRACE_SEIZE, req->tid, 0, (void *)PTRACE_O_TRACESYSGOOD)) {
			req->error = errno;
			req->refused = PL_REFUSED_SEIZE;
			return NULL;
		}
		stage(req, PL_STAGE_SEIZED);
		int64_t begin = now_ns();
		if (interrupt(req, 0)) {
			req->error = errno;
			req->refused = errno == ETIMEDOUT ? PL_REFUSED_NO_STOP : PL_REFUSED_GONE;
			return NULL; /* this thread's end lets go */
		}
		stage(req, PL_STAGE_STOPPED);
		if (calls_in_stop(req)) {
			req->error = errno;
			req->refused = errno == ESRCH ? PL_REFUSED_GONE : PL_REFUSED_CALL;
			return NULL;
		}
		trace(PTRACE_DETACH, req->tid, 0, NULL);
		req->held_ns = now_ns() - begin;
		if (req->refused != PL_REFUSED_RSEQ)
			return NULL;
	}
	return NULL;
}

/* The calls of req on a thread that nobody traces. 0: see refused, error and each call's ret. */
PL_EXPORT int pl_inject(struct pl_inject *req)
{
	pthread_t thread;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int failed = pthread_create(&thread, NULL, job, req);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (failed)
		return -failed;
	pthread_join(thread, NULL);
	return 0;
}

/* The same on a thread that the calling thread traces and that is in any ptrace stop (an exec stop, say). It
 * stays traced and stopped. */
PL_EXPORT int pl_inject_held(struct pl_inject *req)
{
	int64_t begin = now_ns();
	if (interrupt(req, 1)) {
		req->error = errno;
		req->refused = errno == ETIMEDOUT ? PL_REFUSED_NO_STOP : PL_REFUSED_GONE;
		return 0;
	}
	if (calls_in_stop(req)) {
		req->error = errno;
		req->refused = errno == ESRCH ? PL_REFUSED_GONE : PL_REFUSED_CALL;
	}
	req->held_ns = now_ns() - begin;
	return 0;
}
