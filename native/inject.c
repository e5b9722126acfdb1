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
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "inject_frame.h"

#define PL_GETSIGMASK 0x420a
#define PL_SETSIGMASK 0x420b
#define PL_GET_SYSCALL_INFO 0x420e
#define PL_EVENT_STOP 128

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
	if (pl_trace(PTRACE_INTERRUPT, req->tid, 0, NULL))
		return -1;
	if (resume && pl_trace(PTRACE_CONT, req->tid, 0, NULL))
		return -1;
	for (;;) {
		if (next_stop(req, req->tid, &status))
			return -1;
		if (status >> 16 == PL_EVENT_STOP)
			return 0;
		unsigned long sig = status >> 16 ? 0 : (unsigned long)WSTOPSIG(status);
		if (sig == (SIGTRAP | 0x80))
			sig = 0;
		if (pl_trace(PTRACE_CONT, req->tid, 0, (void *)sig))
			return -1;
	}
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
		long n = pl_trace(PTRACE_PEEKSIGINFO, tid, (unsigned long)(uintptr_t)&arg, infos);
		for (long i = 0; i < n; i++)
			if (!(blocked >> (infos[i].si_signo - 1) & 1))
				return 1;
	}
	return 0;
}

/* A thread in a stop of ours whose call ended with EINTR only because of it makes that call again when let go. 1 where
 * *regs was changed so. */
static int again_if_ended(pid_t tid, struct user_regs_struct *regs, uint64_t blocked) {
	if ((long)regs->orig_rax < 0 || (long)regs->rax != -EINTR || !ends_with_eintr((long)regs->orig_rax) ||
	    signal_pending_unblocked(tid, blocked))
		return 0;
	regs->rax = regs->orig_rax;
	regs->rip -= 2;
	regs->orig_rax = ~0ul;
	return 1;
}

void pl_undo_eintr(pid_t tid) {
	struct user_regs_struct regs;
	uint64_t mask;
	if (!pl_trace(PTRACE_GETREGS, tid, 0, &regs) && !pl_trace(PL_GETSIGMASK, tid, 8, &mask) &&
	    again_if_ended(tid, &regs, mask))
		pl_trace(PTRACE_SETREGS, tid, 0, &regs);
}

/* Resume until the next system-call stop of the wanted kind (1 entry, 2 exit). */
static int to_syscall_stop(struct pl_inject *req, int kind)
{
	int status;
	uint8_t info[128];
	unsigned long sig = 0;
	for (;;) {
		if (pl_trace(PTRACE_SYSCALL, req->tid, 0, (void *)sig))
			return -1;
		if (next_stop(req, req->tid, &status))
			return -1;
		sig = 0;
		if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
			memset(info, 0, sizeof(info));
			if (pl_trace(PL_GET_SYSCALL_INFO, req->tid, sizeof(info), info) < 0)
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
	if (pl_trace(PTRACE_SETREGS, req->tid, 0, &regs))
		return -1;
	stage(req, PL_STAGE_REGS);
	/* Only now: until here nothing has changed that the frame does not bring back. */
	if (pl_trace(PL_SETSIGMASK, req->tid, 8, &all))
		return -1;
	stage(req, PL_STAGE_MASK);
	if (to_syscall_stop(req, 1))
		return -1;
	stage(req, PL_STAGE_ENTRY);
	if (pl_trace(PTRACE_GETREGS, req->tid, 0, &regs))
		return -1;
	if (regs.rip != req->gadget + 2 || regs.orig_rax != (unsigned long)call->nr) {
		errno = EPROTO;
		return -1;
	}
	if (to_syscall_stop(req, 2) || pl_trace(PTRACE_GETREGS, req->tid, 0, &regs))
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

/* Whether the code that the target is to run is where it was found: an exec in between puts other code there. */
static int code_is_there(struct pl_inject *req)
{
	static const unsigned char call[] = {0x0f, 0x05, 0xc3}, back[] = {0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f},
				   short_back[] = {0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05}, pop[] = {0x58, 0xc3};
	unsigned char word[8];
	if (pl_trace(PTRACE_PEEKTEXT, req->tid, req->gadget, word) || memcmp(word, call, sizeof(call)))
		return 0;
	if (pl_trace(PTRACE_PEEKTEXT, req->tid, req->sigreturn ? req->sigreturn : req->pop_rax, word))
		return 0;
	if (!req->sigreturn)
		return !memcmp(word, pop, sizeof(pop));
	return !memcmp(word, back, sizeof(back)) || !memcmp(word, short_back, sizeof(short_back));
}

/* req->tid is in a PTRACE_EVENT_STOP of this thread. Leaves it in a stop with its own registers back, or
 * returns -1: then the caller must let go and the frame does the rest. */
static int calls_in_stop(struct pl_inject *req)
{
	struct user_regs_struct regs, back;
	uint64_t mask, sp;
	if (pl_trace(PTRACE_GETREGS, req->tid, 0, &regs))
		return -1;
	if (regs.cs != 0x33) {
		req->refused = PL_REFUSED_32BIT;
		return 0;
	}
	if (pl_in_rseq(req, regs.rip)) {
		req->refused = PL_REFUSED_RSEQ;
		return 0;
	}
	if (!code_is_there(req)) {
		req->refused = PL_REFUSED_IMAGE;
		return 0;
	}
	if (!pl_stack_is_safe(req, &regs, PL_MAX_XSTATE / 2)) {
		req->refused = PL_REFUSED_STACK;
		return 0;
	}
	if (pl_trace(PL_GETSIGMASK, req->tid, 8, &mask))
		return -1;
	sp = pl_write_frame(req, &regs, mask);
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
	if (again_if_ended(req->tid, &back, mask))
		req->restarted = 1;
	int failed = run_calls(req, &regs, sp), saved = errno;
	if (failed && (saved == ESRCH || saved == ETIMEDOUT)) {
		errno = saved;
		return -1;
	}
	if (pl_trace(PL_SETSIGMASK, req->tid, 8, &mask))
		return -1;
	stage(req, PL_STAGE_UNMASK);
	/* An interrupted call still has its -ERESTART code and number: letting go raises TIF_SIGPENDING
	 * (ptrace_signal_wake_up), so arch_do_signal_or_restart() restarts it as it would have. */
	if (pl_trace(PTRACE_SETREGS, req->tid, 0, &back))
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
		if (pl_trace(PTRACE_SEIZE, req->tid, 0, (void *)PTRACE_O_TRACESYSGOOD)) {
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
		pl_trace(PTRACE_DETACH, req->tid, 0, NULL);
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
