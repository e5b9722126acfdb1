"""Starts a program so that its first instruction and its last are ours to see: held at exec and at exit.

For `dirty -- CMD`: the new image must be armed before it writes, and looked at once more before its memory is
gone. One thread traces the leader with PTRACE_O_TRACEEXEC and PTRACE_O_TRACEEXIT and nothing else; signals
are passed on as they come, job control works, and if we are killed the program is detached by the kernel and
goes on. Its own children and threads are not traced.

What a tracer cannot hide: a debugger or strace inside the program cannot attach to its leader meanwhile.
Rejected: LD_PRELOAD (static programs, exec), stopping it with SIGSTOP (visible to its parent), seccomp (the
filter outlives us).
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pagelens.linux import ptrace
from pagelens.vm.errors import PagelensError, TargetGoneError

_OPTIONS = 0x01 | 0x10 | 0x40  # PTRACE_O_TRACESYSGOOD (for inject), PTRACE_O_TRACEEXEC, PTRACE_O_TRACEEXIT
_EVENT_EXEC, _EVENT_EXIT = 4, 6


class ExecFailedError(PagelensError):
    """The program did not start: exit code 127 (not found) or 126 (not executable), as a shell does."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"cannot run {name}: {why_exec_failed(shutil.which(name) or name, number)}")
        self.exit_code = 127 if number == errno.ENOENT else 126


def why_exec_failed(path: str, number: int) -> str:
    """Why execve of `path` failed. ENOENT for a file that is there means its interpreter (execve(2)): the one that a
    script's first line names, or the dynamic linker of an ELF file."""
    if number != errno.ENOENT or not Path(path).exists():
        return os.strerror(number)
    try:
        with Path(path).open("rb") as file:
            line = file.readline(256)
    except OSError:
        return os.strerror(number)
    named = line[2:].split()
    if line.startswith(b"#!") and named:
        return f"its interpreter {os.fsdecode(named[0])} is missing"
    return "its interpreter (the dynamic linker) is missing"


class Launched:
    """A program under way. on_exec(pid) and on_exit(pid) are called in the tracing thread while the leader is
    held; what they raise ends the tracing (the program goes on) and comes out of `wait`."""

    def __init__(
        self, argv: Sequence[str], on_exec: Callable[[int], None], on_exit: Callable[[int], None]
    ) -> None:
        self._on_exec = on_exec
        self._on_exit = on_exit
        self._status: queue.Queue[int | BaseException] = queue.Queue()
        go_read, go_write = os.pipe()
        err_read, err_write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _child(argv, go_read, err_write, (go_write, err_read))
        os.close(go_read)
        os.close(err_write)
        self._thread = threading.Thread(target=self._trace, args=(go_write,), daemon=True)
        self._thread.start()
        number = os.read(err_read, 8)  # "" once exec has closed it
        os.close(err_read)
        if number:
            self._thread.join()
            raise ExecFailedError(argv[0], int(number))

    def _trace(self, go: int) -> None:
        try:
            ptrace.request(ptrace.PTRACE_SEIZE, self.pid, 0, _OPTIONS)
            os.write(go, b"1")
            os.close(go)
            self._status.put(self._loop())
        except BaseException as error:
            self._status.put(error)

    def _loop(self) -> int:
        while True:
            _, status = os.waitpid(self.pid, ptrace.WALL)
            if not os.WIFSTOPPED(status):
                return status
            stopped_by, event = os.WSTOPSIG(status), status >> 16
            how, data = ptrace.PTRACE_CONT, 0
            if event == _EVENT_EXEC:
                self._on_exec(self.pid)
            elif event == _EVENT_EXIT:
                self._on_exit(self.pid)
            elif event == ptrace.PTRACE_EVENT_STOP and stopped_by in ptrace.STOP_SIGNALS:
                how = ptrace.PTRACE_LISTEN
            elif not event:
                data = stopped_by
            with contextlib.suppress(TargetGoneError):  # killed while held: the next wait says so
                ptrace.request(how, self.pid, 0, data)

    def wait(self, timeout: float | None = None) -> int | None:
        """The wait status (os.waitstatus_to_exitcode), or None after `timeout` seconds. Raises what a
        callback raised."""
        try:
            result = self._status.get(timeout=timeout)
        except queue.Empty:
            return None
        self._status.put(result)
        if isinstance(result, BaseException):
            raise result
        return result


def _child(argv: Sequence[str], go: int, err: int, others: tuple[int, int]) -> None:
    # Runs in the forked child; never returns.
    try:
        for fd in others:
            os.close(fd)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would keep that
            signal.signal(number, signal.SIG_DFL)
        if os.read(go, 1):
            os.execvp(argv[0], list(argv))
    except OSError as exc:
        os.write(err, str(exc.errno or errno.EIO).encode())
    finally:
        os._exit(127)
