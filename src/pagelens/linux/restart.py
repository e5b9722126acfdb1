"""How an interrupted system call goes on after a stop that the program shall not notice.

Most calls return one of the kernel's -ERESTART codes at a stop and are made again by it. Two sorts are not:
ERESTART_RESTARTBLOCK needs what the kernel remembers of the call, and some calls end with EINTR at any stop,
handler or not (signal(7), "Interruption of system calls by stop signals"). Nobody sent the program a signal,
so it shall not see one: such a call is made again from its arguments, a relative timeout starting anew.

Rejected: all calls that returned EINTR (close has closed its descriptor by then, connect goes on beside).
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from pagelens.linux.ptrace import ERESTART_RESTARTBLOCK, Tracee, UserRegs, siginfo_signal
from pagelens.vm.errors import PagelensError

_CODE = 16  # bytes before the call's instruction that are looked at

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


RESTART_SYSCALL = 219
_WITH_RESTART_BLOCK = frozenset((7, 35, 202, 230))  # poll, nanosleep, futex, clock_nanosleep


def named(code: bytes) -> int | None:
    """The number of a call that leaves something to restart, from the code before its instruction: the last
    mov $number,%eax in it. None where there is none (syscall(2) of libc takes it from a register)."""
    for at in range(len(code) - 5, -1, -1):
        if code[at] == 0xB8:
            number = int.from_bytes(code[at + 1 : at + 5], "little")
            if number in _WITH_RESTART_BLOCK:
                return number
    return None


def true_call(regs: UserRegs, read: Callable[[int, int], bytes]) -> UserRegs:
    """Registers of a held thread with the call that the program made.

    A stop makes of a call that ends with ERESTART_RESTARTBLOCK a restart_syscall(2), and that is all that the next
    stop shows. What it would restart is the thread's last such call, at a rollback another one, or none (EINTR after
    a handler has run): so the number is taken from the program's code. Where that does not show it, it stays.
    read: (address, length) -> the target's memory, OSError where there is none.
    """
    if regs.in_syscall and regs.orig_rax == RESTART_SYSCALL and regs.result == -ERESTART_RESTARTBLOCK:
        try:
            number = named(read(regs.rip - 2 - _CODE, _CODE))
        except (OSError, PagelensError):
            number = None
        if number is not None:
            regs.orig_rax = number
    return regs


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
