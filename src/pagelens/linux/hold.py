"""Hold all threads of a process still, and let them go as they were.

    with Held(pid) as held:
        for thread in held.threads: print(thread.tid, hex(thread.regs().rip))

What it guarantees:
- every thread is in a ptrace stop: threads are listed, seized and stopped until a listing shows no new one (a
  stopped process cannot make more);
- signals that arrive meanwhile are passed on with their siginfo when we let go, never lost;
- a job-control-stopped process stays stopped, and a frozen one frozen;
- an interrupted system call goes on, also one that the kernel would end with EINTR (restart.py);
- whatever happens to us (SIGKILL included) the kernel detaches and the target goes on.

A thread that does not reach a stop (uninterruptible sleep, a parent in vfork) is found *before* anything
is seized: a seized thread can only be let go from a stop, or by our exit. If one slips into such a state at
the wrong moment all others are let go, the error says so, and the kernel frees that one when pagelens exits.

Rejected: SIGSTOP (the parent sees it, and our death leaves it stopped); the cgroup freezer (gives no
registers); one seize for a long session (between two stops every signal for the target would wait for us:
seizing afresh each time costs microseconds and leaves a running target untraced).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from pagelens.linux.ptrace import WALL, Stop, Tracee, libc, siginfo_signal
from pagelens.linux.restart import Place, redo_eintr, undo_eintr
from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError, UsageError

PF_KTHREAD = 0x00200000  # include/linux/sched.h, field `flags` of stat
DEFAULT_TIMEOUT = (
    5.0  # seconds for all threads to stop; a stop takes microseconds unless a thread is in D state
)


def _stat(pid: int, tid: int) -> list[str] | None:
    # Fields of /proc/PID/task/TID/stat from `state` (field 3) on; None when gone.
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _status_field(pid: int, name: str, tid: int | None = None) -> str:
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return line.partition(":")[2].strip()
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"process {pid} is gone") from None
    return ""


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def thread_ids(pid: int) -> list[int]:
    """Threads of the process, as /proc lists them (unreaped dead ones included). TargetGoneError."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208 - names only, hot
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"no process {pid}") from None


def check_target(pid: int) -> None:
    """Refuse, in one sentence, a process that cannot be held. Nothing is touched.

    UsageError: itself, a kernel thread, a thread id. TargetGoneError: none, zombie.
    CapabilityMissingError: traced by another, or 32-bit.
    """
    if pid == os.getpid():
        raise UsageError(f"process {pid} is pagelens itself; it cannot hold itself")
    stat = _stat(pid, pid)
    if stat is None:
        if pid > 0 and Path(f"/proc/{pid}/status").exists():
            leader = _status_field(pid, "Tgid")
            raise UsageError(f"{pid} is a thread of process {leader}; give {leader}")
        raise TargetGoneError(f"no process {pid}")
    leader = _status_field(pid, "Tgid")
    if leader and leader != str(pid):
        raise UsageError(f"{pid} is a thread of process {leader}; give {leader}")
    if int(stat[6]) & PF_KTHREAD:
        raise UsageError(f"{pid} ({_comm(pid)}) is a kernel thread; it has no address space of its own")
    if stat[0] in "ZX" and len(thread_ids(pid)) <= 1:
        raise TargetGoneError(f"process {pid} ({_comm(pid)}) has exited and waits to be reaped (zombie)")
    tracer = int(_status_field(pid, "TracerPid") or 0)
    if tracer:
        raise CapabilityMissingError(
            f"process {pid} is already traced by {tracer} ({_comm(tracer)}); the kernel allows one tracer",
            capability="ptrace",
            fix=f"detach that debugger, or wait for it: tail --pid={tracer} -f /dev/null",
        )
    with contextlib.suppress(OSError), open(f"/proc/{pid}/exe", "rb") as exe:
        head = exe.read(5)
        if head[:4] == b"\x7fELF" and head[4] == 1:
            raise CapabilityMissingError(
                f"process {pid} ({_comm(pid)}) runs 32-bit code; pagelens knows x86-64 only"
            )


def _permission_error(pid: int, tid: int) -> PagelensError:
    # EPERM of PTRACE_SEIZE (__ptrace_may_access, yama): say which of its reasons it was.
    stat = _stat(pid, tid)
    if stat is None or stat[0] in "ZX":
        return TargetGoneError(f"process {pid} exited while it was being seized")
    tracer = int(_status_field(pid, "TracerPid", tid) or 0)
    if tracer:
        return CapabilityMissingError(
            f"thread {tid} of process {pid} is already traced by {tracer} ({_comm(tracer)})",
            capability="ptrace",
        )
    owner = (_status_field(pid, "Uid").split() or ["?"])[0]
    if owner != str(os.geteuid()) and os.geteuid() != 0:
        return CapabilityMissingError(
            f"process {pid} belongs to user {owner}, not to you",
            capability="ptrace",
            fix="run pagelens with sudo",
        )
    with contextlib.suppress(OSError), open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as file:
        scope = file.read().strip()
        if scope != "0":
            return CapabilityMissingError(
                f"kernel.yama.ptrace_scope is {scope}: only a parent may trace process {pid}",
                capability="ptrace",
                fix="run pagelens with sudo, or sysctl -w kernel.yama.ptrace_scope=0",
            )
    return CapabilityMissingError(
        f"the kernel refuses ptrace of process {pid} (not dumpable, other capabilities, seccomp or an LSM)",
        capability="ptrace",
        fix="run pagelens with CAP_SYS_PTRACE (sudo; docker run --cap-add SYS_PTRACE)",
    )


class Held:
    """All threads of `pid` in a ptrace stop between `__enter__` and `__exit__`.

    threads: Tracee of each, leader first, by tid; dead leaders of a living process are left out.
    interrupted_ns, stopped_ns: CLOCK_MONOTONIC when threads were asked to stop, and when all had.
    held_ns: from interrupted_ns until all ran again, after exit.
    Raises UsageError, TargetGoneError, CapabilityMissingError as `check_target`; use from one OS thread only.
    """

    def __init__(self, pid: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.pid = pid
        self.timeout = timeout
        self.threads: list[Tracee] = []
        self._undone: dict[int, Place] = {}  # where threads were whose calls are made again
        self.interrupted_ns = 0
        self.stopped_ns = 0
        self.held_ns = 0
        self._collects = False  # the garbage collector ran before

    @property
    def leader(self) -> Tracee:
        """The first thread that lives."""
        return self.threads[0]

    def __enter__(self) -> Held:
        check_target(self.pid)
        deadline = time.monotonic() + self.timeout
        self._wait_stoppable(deadline)
        self._collects = gc.isenabled()
        gc.disable()  # a full collection takes some 10 ms, in which the process would stand still
        self.interrupted_ns = time.monotonic_ns()
        try:
            self._stop_all(deadline)
        except ValueError as error:
            self.release()
            raise CapabilityMissingError(f"process {self.pid}: {error}; pagelens knows x86-64 only") from None
        except BaseException:
            self.release()
            raise
        self.stopped_ns = time.monotonic_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _wait_stoppable(self, deadline: float) -> None:
        # D state: short for disk I/O, for long in vfork, in a dead NFS or in the v1 freezer.
        while True:
            stuck = [tid for tid in thread_ids(self.pid) if (_stat(self.pid, tid) or "?")[0] == "D"]
            if not stuck:
                return
            if time.monotonic() > deadline:
                raise UsageError(
                    f"thread {stuck[0]} of process {self.pid} is in uninterruptible sleep (D: vfork, disk or "
                    "network I/O, or a frozen v1 cgroup) and cannot be held; nothing was touched"
                )
            time.sleep(0.001)

    def _stop_all(self, deadline: float) -> None:
        held: dict[int, Tracee] = {}
        dead: set[int] = set()
        while True:
            fresh: list[Tracee] = []
            for tid in thread_ids(self.pid):
                if tid in held or (tid in dead and (_stat(self.pid, tid) or "Z")[0] in "ZX"):
                    continue  # a dead leader's id comes to life again by exec in another thread
                thread = self._seize(tid, dead)
                if thread is not None:
                    held[tid] = thread
                    self.threads.append(thread)
                    fresh.append(thread)
            if not fresh:
                if self._drop_killed(held):
                    continue
                break
            for thread in fresh:
                with contextlib.suppress(TargetGoneError):
                    thread.interrupt()
            for thread in fresh:
                try:
                    stop = self._await_stop(thread, deadline)
                    if stop is not None:
                        # At once: if we are killed before it, the call ends with EINTR, as after SIGSTOP and SIGCONT.
                        self._undo(thread)
                except TargetGoneError:
                    # Exited; exec by another thread also ends here, and the new leader is listed anew.
                    self._reap(thread.tid)
                    self.threads.remove(thread)
                    del held[thread.tid]
                    continue
                if stop is None:
                    raise UsageError(
                        f"thread {thread.tid} of process {self.pid} did not stop within {self.timeout:g} s "
                        "(uninterruptible); all others go on, and this one is let go when pagelens exits"
                    )
        if not self.threads:
            raise TargetGoneError(f"process {self.pid} exited while it was being stopped")
        self.threads.sort(key=lambda thread: (thread.tid != self.pid, thread.tid))

    def _undo(self, thread: Tracee) -> None:
        was = undo_eintr(thread, thread.regs())
        if was is not None:
            self._undone[thread.tid] = was

    def _drop_killed(self, held: dict[int, Tracee]) -> bool:
        # exec in a thread that still ran kills those that had stopped, and takes over the leader's id.
        killed = []
        for thread in self.threads:
            try:
                self._undo(thread)
            except TargetGoneError:
                killed.append(thread)
        for thread in killed:
            self._reap(thread.tid)
            self.threads.remove(thread)
            del held[thread.tid]
        return bool(killed)

    def _await_stop(self, thread: Tracee, deadline: float) -> Stop | None:
        # exec in a thread that is not seized yet ends a seized leader without a word: the new one takes its
        # id, and is nobody's tracee (de_thread, exchange_tids). On a slow machine this is the rule, not a
        # rare race.
        while True:
            now = time.monotonic()
            stop = thread.wait(min(deadline, now + 0.05))
            if stop is not None or now > deadline:
                return stop
            tracer = _status_field(self.pid, "TracerPid", thread.tid)
            if int(tracer or 0) != threading.get_native_id():
                raise TargetGoneError(
                    f"thread {thread.tid} of process {self.pid} made way for another's exec"
                )

    def _seize(self, tid: int, dead: set[int]) -> Tracee | None:
        tries = 400
        for number in range(400):
            try:
                return Tracee.seize(tid)
            except TargetGoneError:
                dead.add(tid)
                return None
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EACCES):
                    raise
            if number == 0:
                owner = (_status_field(self.pid, "Uid").split() or ["?"])[0]
                tries = 400 if os.geteuid() == 0 or owner == str(os.geteuid()) else 3
            if number == tries:
                break
            stat = _stat(self.pid, tid)
            if stat is None or stat[0] in "ZX":
                dead.add(tid)  # a leader that called pthread_exit, or a thread that just died
                return None
            if int(_status_field(self.pid, "TracerPid", tid) or 0) == threading.get_native_id():
                # exec in a thread that we had seized: the tracing moved to the leader's id.
                return Tracee(tid)
            # EPERM is also what a thread in the middle of exec or exit gives (exit_state): look again.
            time.sleep(0.0005)
        raise _permission_error(self.pid, tid)

    def _reap(self, tid: int) -> None:
        # A traced thread that died waits for its tracer. A leader that is our own child: its starter reaps.
        stat = _stat(self.pid, tid)
        if tid == self.pid and stat is not None and int(stat[1]) == os.getpid():
            return
        with contextlib.suppress(ChildProcessError):
            peek = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)
            if peek is not None and peek.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | WALL)

    def release(self) -> None:
        """Let every thread go, with its signals. Never raises for a target that is gone; idempotent."""
        for thread in self.threads:
            try:
                if thread.stop is None and not self._collect(thread):
                    continue  # uninterruptible: freed when we exit, see the module
                self._let_go(thread)
            except TargetGoneError:
                self._reap(thread.tid)
            except OSError:
                # Not in a stop any more (killed, or resumed by a caller that failed): our exit detaches it.
                with contextlib.suppress(OSError, TargetGoneError):
                    thread.detach()
        if self.threads and self.stopped_ns:
            self.held_ns = time.monotonic_ns() - self.interrupted_ns
        self.threads = []
        if self._collects:
            self._collects = False
            gc.enable()

    def _collect(self, thread: Tracee) -> bool:
        # Seized, and then an error came: a stop that it was asked for may still come, or its end.
        with contextlib.suppress(TargetGoneError):
            thread.interrupt()
        return thread.wait(time.monotonic() + 1.0) is not None

    def _let_go(self, thread: Tracee) -> None:
        stop = thread.stop
        assert stop is not None
        if thread.tid in self._undone:
            redo_eintr(thread, self._undone[thread.tid])
        if stop.is_signal_delivery and len(thread.pending) == 1:
            thread.detach(stop.signal)  # the kernel still has its siginfo
            return
        if not thread.pending:
            thread.detach()
            return
        # Signals were dequeued and the thread has moved on (system calls were run in it): queue them anew,
        # and give each its siginfo back when it comes up for delivery; tgkill alone would lose si_code and
        # si_value.
        waiting = list(thread.pending)
        for info in waiting:
            with contextlib.suppress(ProcessLookupError):
                _tgkill(self.pid, thread.tid, siginfo_signal(info))
        deadline = time.monotonic() + 1.0
        pass_on = 0
        while waiting:
            thread.pending = []
            thread.cont(pass_on)
            reached = thread.wait(deadline)
            if reached is None:
                thread.interrupt()  # blocked meanwhile: they stay queued, with tgkill's siginfo
                if thread.wait(time.monotonic() + 1.0) is None:
                    return
                break
            if not reached.is_signal_delivery:
                pass_on = 0
                continue
            match = next((info for info in waiting if siginfo_signal(info) == reached.signal), None)
            if match is not None:
                thread.set_siginfo(match)
                waiting.remove(match)
            pass_on = reached.signal
        reached = thread.stop
        thread.detach(reached.signal if reached is not None and reached.is_signal_delivery else 0)


def _tgkill(pid: int, tid: int, number: int) -> None:
    # No tgkill in the standard library; the pidfd form needs a thread pidfd (6.9).
    if libc.syscall(234, pid, tid, number):
        raise ProcessLookupError(pid)


def is_held_by_us(pid: int) -> bool:
    """Whether a thread of this process traces one of `pid` (the final check of commands and tests)."""
    mine = {str(tid) for tid in thread_ids(os.getpid())}  # TracerPid is the tracer's thread id
    with contextlib.suppress(TargetGoneError):
        return any(_status_field(pid, "TracerPid", tid) in mine for tid in thread_ids(pid))
    return False


__all__ = ["Held", "check_target", "is_held_by_us", "thread_ids"]
