"""Stops at exec and exit of a process tree, by ptrace, for snapshots; on request at system calls too.

PTRACE_SEIZE with the EXEC, EXIT, FORK, VFORK and CLONE options: no signal is sent, no system call is
slowed (unless they are asked for), and when the tracer dies the kernel detaches every tracee (no
PTRACE_O_EXITKILL). Rejected: PTRACE_ATTACH (sends SIGSTOP), stopping by signals (a killed recorder would leave the
program stopped).

What it changes all the same (ptrace(2)): TracerPid is ours, so a debugger or LeakSanitizer inside the tree
cannot attach. `run --snapshot none` uses no ptrace.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from pagelens.linux import ptrace
from pagelens.linux.procfs import process_of
from pagelens.vm.errors import TargetGoneError

_O_SYSGOOD = 1  # system-call stops are marked by bit 7 of the signal
_O_FORK, _O_VFORK, _O_CLONE, _O_EXEC, _O_EXIT = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 6
_E_FORK, _E_VFORK, _E_EXEC, _E_EXIT = 1, 2, 4, 6
_E_NEW = (1, 2, 3)  # fork, vfork, clone
_GETEVENTMSG = 0x4201


def _ptrace(number: int, tid: int, data: int = 0) -> bool:
    # False when the tracee is gone (killed while it was stopped): its exit will be reported by waitpid.
    try:
        ptrace.request(number, tid, 0, data)
    except TargetGoneError:
        return False
    return True


class Tracer:
    """Traces a tree from one of our children on. All calls from one thread (ptrace ties a tracee to it)."""

    def __init__(
        self,
        root: int,
        on_exec: Callable[[int], None],
        on_last_exit: Callable[[int], None],
        on_task_exit: Callable[[int], None] | None = None,
        on_call: Callable[[int], None] | None = None,
        on_start: Callable[[int, int], None] | None = None,
        on_fork: Callable[[int], None] | None = None,
    ) -> None:
        """Seizes `root`. The callbacks get the id of a process (on_task_exit, on_call: of any thread) that is stopped.
        on_call: at the entry and the exit of every system call, which slows each by two stops. on_start: (who, the new
        task), while who is stopped. on_fork: who has forked, and is stopped; not for vfork and threads.

        OSError (EPERM) where ptrace is not allowed.
        """
        self._root = root
        self._on_exec, self._on_exit = on_exec, on_last_exit
        self._on_task_exit = on_task_exit
        self._on_call = on_call
        self._on_start = on_start
        self._on_fork = on_fork
        self._go = ptrace.PTRACE_SYSCALL if on_call else ptrace.PTRACE_CONT
        self._exiting: set[int] = set()
        self._borrowers: set[int] = set()  # vfork children that use their parent's address space
        options = _O_FORK | _O_VFORK | _O_CLONE | _O_EXEC | _O_EXIT
        options |= _O_SYSGOOD if on_call else 0
        ptrace.request(ptrace.PTRACE_SEIZE, root, 0, options)

    def step(self) -> tuple[int, int] | None:
        """Wait for one event and handle it. Returns (pid, wait status) when a task ended, else None.

        ChildProcessError when nothing is left; InterruptedError is not raised (PEP 475).
        """
        tid, status = os.waitpid(-1, ptrace.WALL)
        if not os.WIFSTOPPED(status):
            self._exiting.discard(tid)
            self._borrowers.discard(tid)
            return tid, status
        event, sig = status >> 16, os.WSTOPSIG(status)
        if event == ptrace.PTRACE_EVENT_STOP:
            stopped = sig in ptrace.STOP_SIGNALS
            _ptrace(ptrace.PTRACE_LISTEN if stopped else self._go, tid)
        elif event == _E_EXEC:
            self._borrowers.discard(tid)
            self._call(self._on_exec, tid)
            _ptrace(self._go, tid)
        elif event == _E_EXIT:
            self._exit_stop(tid)
            _ptrace(self._go, tid)
        elif event:
            message = ctypes.c_ulong()
            if event in _E_NEW and _ptrace(_GETEVENTMSG, tid, ctypes.addressof(message)):
                if event == _E_VFORK:
                    self._borrowers.add(message.value)
                if self._on_start is not None:
                    self._on_start(tid, message.value)
            if event == _E_FORK and self._on_fork is not None:
                self._call(self._on_fork, process_of(tid))
            _ptrace(self._go, tid)
        elif sig == ptrace.SIGTRAP | 0x80:
            if self._on_call is not None:
                self._call(self._on_call, tid)
            _ptrace(self._go, tid)
        else:
            _ptrace(self._go, tid, sig)
        return None

    def _exit_stop(self, tid: int) -> None:
        self._exiting.add(tid)
        if self._on_task_exit is not None:
            self._call(self._on_task_exit, tid)
        if tid in self._borrowers:
            return
        try:
            others = {int(entry.name) for entry in os.scandir(f"/proc/{tid}/task")}
        except OSError:
            return
        if not others - self._exiting:
            self._call(self._on_exit, process_of(tid))

    @staticmethod
    def _call(callback: Callable[[int], None], pid: int) -> None:
        # Whatever goes wrong with a snapshot, the tracee is continued; the callback notes its own losses.
        callback(pid)
