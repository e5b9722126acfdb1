"""Record one program and all that it starts, from its execve to the end of the tree.

The main thread waits for the program, and is its tracer where snapshots are taken.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pagelens.capture.session import Session, Settings
from pagelens.linux.drain import HeldProgram
from pagelens.linux.perf_recording import PerfRecording
from pagelens.linux.tracer import Tracer
from pagelens.vm.errors import CapabilityMissingError

__all__ = ["Recorder", "Result", "Settings"]

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Result:
    """How it ended. status: of the program, as wait(2) gives it, None if it was never started."""

    summary: dict[str, Any]
    status: int | None
    exec_errno: int = 0
    notes: list[str] = field(default_factory=list)


class _StopWaiting(Exception):
    # Ctrl-C after the program has ended, while others of its tree run on.
    pass


class Recorder:
    """Records one program. Use once."""

    def __init__(
        self, path: Path, settings: Settings, *, command: Sequence[str], force: bool = False
    ) -> None:
        """As Session: nothing is started yet."""
        self._settings = settings
        self._session = Session(path, settings, command=command, force=force)
        self._recording = self._session.recording
        self._interrupted = False
        self._root_gone = False

    def run(self, path: str, argv: Sequence[str]) -> Result:
        """Start `path`, wait, write the summary."""
        program = HeldProgram(path, argv)
        self._program = program
        handlers = self._install_handlers()
        try:
            self._recording.arm(program.pid)
            self._session.start()
            tracer = self._tracer() if self._settings.snapshot != "none" else None
            program.release()
            status = self._wait() if tracer is None else self._trace(tracer)
            exec_errno = program.exec_error()
            summary = self._session.finish()
        except CapabilityMissingError:
            program.abandon()
            self._session.abandon()
            shutil.rmtree(self._session.writer.path, ignore_errors=True)
            raise
        except BaseException:
            program.abandon()
            self._session.abandon()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(summary, status, exec_errno, self._session.notes)

    # -- waiting

    def _install_handlers(self) -> dict[signal.Signals, Any]:
        # The terminal sends SIGINT and SIGQUIT to the program too: we only remember that they came. What
        # somebody sends to us alone (SIGTERM, …) is passed on.
        def interrupted(_number: int, _frame: FrameType | None) -> None:
            self._interrupted = True
            if self._root_gone:
                raise _StopWaiting

        def forward(number: int, _frame: FrameType | None) -> None:
            try:
                os.kill(self._program.pid, number)
            except ProcessLookupError:
                interrupted(number, None)

        old: dict[signal.Signals, Any] = {}
        for number, handler in (
            (signal.SIGINT, interrupted),
            (signal.SIGQUIT, interrupted),
            *((n, forward) for n in _FORWARDED),
        ):
            if signal.getsignal(number) is not signal.SIG_IGN:
                old[number] = signal.signal(number, handler)
        return old

    def _tracer(self) -> Tracer | None:
        # None where ptrace is not allowed (a sandbox): no snapshots then, and without perf the counters of wait4 alone.
        perf = self._recording if isinstance(self._recording, PerfRecording) else None
        try:
            return Tracer(
                self._program.pid,
                self._at_exec,
                self._at_exit,
                perf.at_task_exit if perf else None,
                perf.at_call if perf and self._settings.calls == "ptrace" else None,
                perf.at_start if perf and not perf.events else None,
                self._session.take_frames if self._settings.snapshot == "full" else None,
            )
        except PermissionError:
            if self._settings.calls == "ptrace":
                raise CapabilityMissingError(
                    "--calls ptrace needs ptrace, which is not allowed here",
                    capability="ptrace",
                    fix="see pagelens doctor",
                ) from None
            self._session.without_stops()
            return None

    def _wait(self) -> int:
        _, status, used = os.wait4(self._program.pid, 0)
        self._root_gone = True
        if isinstance(self._recording, PerfRecording) and not self._recording.events:
            self._recording.waited(used.ru_minflt, used.ru_majflt)
        if self._settings.until == "tree":
            with contextlib.suppress(_StopWaiting):
                while self._recording.live_tasks() > 0:
                    time.sleep(0.005)
        self._settle(1)
        return status

    def _trace(self, tracer: Tracer) -> int:
        status = -1
        with contextlib.suppress(_StopWaiting, ChildProcessError):
            while not (self._root_gone and self._settings.until == "program"):
                ended = tracer.step()
                if ended and ended[0] == self._program.pid:
                    status = ended[1]
                    self._root_gone = True
        self._settle(1)
        return status

    def _settle(self, seconds: float) -> None:
        # A task can be waited for a little before the switch that ends its record.
        until = time.monotonic() + (seconds if self._settings.until == "tree" else 0.05)
        with contextlib.suppress(_StopWaiting):
            while self._recording.live_tasks() > 0 and time.monotonic() < until and not self._interrupted:
                time.sleep(0.002)

    # -- snapshots, called while the process is stopped

    def _at_exec(self, pid: int) -> None:
        if isinstance(self._recording, PerfRecording):
            self._recording.at_exec(pid)
        self._session.take(pid, "exec")

    def _at_exit(self, pid: int) -> None:
        self._session.take(pid, "exit")
