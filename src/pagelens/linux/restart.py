"""How an interrupted system call goes on after a stop that the program shall not notice.

Most calls return one of the kernel's -ERESTART codes at a stop and are made again by it. Two sorts are not:
ERESTART_RESTARTBLOCK needs what the kernel remembers of the call, and some calls end with EINTR at any stop,
handler or not (signal(7), "Interruption of system calls by stop signals"). Nobody sent the program a signal,
so it shall not see one: such a call is made again from its arguments, a relative timeout starting anew.

Rejected: all calls that returned EINTR (close has closed its descriptor by then, connect goes on beside).
"""

from __future__ import annotations

import errno

from pagelens.linux.ptrace import ERESTART_RESTARTBLOCK, Tracee, UserRegs, siginfo_signal

# Calls that end with EINTR at any stop and have done nothing by then; native/inject.c has the same list.
ENDS_WITH_EINTR = frozenset(
    (
        *(232, 281, 441),  # epoll_wait, epoll_pwait, epoll_pwait2 (fs/eventpoll.c, ep_poll)
        *(65, 220),  # semop, semtimedop (ipc/sem.c)
        *(208, 333),  # io_getevents, io_pgetevents (fs/aio.c)
        128,  # rt_sigtimedwait (kernel/signal.c)
        426,  # io_uring_enter: what it had submitted would be its result instead
        *(0, 19, 45, 47),  # read, readv, recvfrom, recvmsg: of a socket with SO_RCVTIMEO (sock_intr_errno)
        *(1, 20, 44, 46),  # write, writev, sendto, sendmsg: with SO_SNDTIMEO; nothing was taken yet
        *(43, 288),  # accept, accept4
    )
)


def again(regs: UserRegs) -> UserRegs:
    """Registers with which the thread makes its system call anew."""
    regs.rax = regs.orig_rax
    regs.rip -= 2
    regs.orig_rax = 2**64 - 1
    return regs


def restartable(regs: UserRegs) -> UserRegs:
    """Saved registers with which an interrupted system call goes on, at any later time.

    -ERESTARTSYS and its kin work as they are: the kernel looks at orig_rax when it lets go. Only
    ERESTART_RESTARTBLOCK needs what the kernel remembers of the call (its deadline), and that may be of a
    later call by now; so the call is made again: a relative sleep starts anew.
    """
    return again(regs) if regs.in_syscall and regs.result == -ERESTART_RESTARTBLOCK else regs


Place = tuple[int, int, int]  # rip, rax, orig_rax


def undo_eintr(thread: Tracee, regs: UserRegs) -> Place | None:
    """A held thread whose call ended with EINTR only because it was stopped makes it again when it is let go.

    Returns where it was, for `redo_eintr`; None where nothing was done.
    """
    if not regs.in_syscall or regs.result != -errno.EINTR or regs.orig_rax not in ENDS_WITH_EINTR:
        return None
    if thread.stop is None or thread.stop.is_signal_delivery or thread.stop.is_group_stop:
        return None  # a signal there is
    if _signal_waits(thread):
        return None
    was = (regs.rip, regs.rax, regs.orig_rax)
    thread.set_regs(again(regs))
    return was


def redo_eintr(thread: Tracee, was: Place) -> None:
    """Before such a thread is let go: a signal that came meanwhile ends its call after all (the program may wait for
    just that), unless its registers are others by now."""
    if not thread.pending and not _signal_waits(thread):
        return
    regs = thread.regs()
    if (regs.rip, regs.rax, regs.orig_rax) == (was[0] - 2, was[2], 2**64 - 1):
        regs.rip, regs.rax, regs.orig_rax = was
        thread.set_regs(regs)


def _signal_waits(thread: Tracee) -> bool:
    blocked = thread.sigmask()
    queued = thread.queued_signals(shared=False) + thread.queued_signals(shared=True)
    return not all(blocked >> (siginfo_signal(info) - 1) & 1 for info in queued)
