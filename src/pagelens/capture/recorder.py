"""The recorder: one program and all that it starts, from its execve to the end of the tree.

Threads: the main one waits for the program (and is its tracer where snapshots are taken); the drain is C; one
Python thread turns finished spool segments into Parquet every few seconds. A failure of ours (a full disk)
stops the recording, never the program.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from pagelens import __version__
from pagelens.capture import convert, records, snapshots
from pagelens.capture.balance import Ended, balance, losses
from pagelens.capture.store import CaptureWriter
from pagelens.linux import snapshot as live
from pagelens.linux.drain import HeldProgram
from pagelens.linux.perf_recording import PerfRecording
from pagelens.linux.recording import DEFAULT_RING, BpfRecording, Options
from pagelens.linux.settings import memory_settings
from pagelens.linux.tracer import Tracer
from pagelens.vm.errors import CapabilityMissingError, PagelensError
from pagelens.vm.snapshot import Snapshot

PART_SECONDS = 3.0
PART_BYTES = 48 << 20
_ALIVE_PART = 99_999_998  # behind the parts of all segments
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Settings:
    """What `run` was asked for. max_size: bytes of events to keep, 0 for all. until: "tree" or "program"."""

    detail: str = "normal"
    snapshot: str = "full"
    ring_size: int = DEFAULT_RING
    max_size: int = 0
    until: str = "tree"
    switches: bool | None = None  # None: with normal and full
    method: str = "auto"  # or bpf, perf


@dataclass
class Result:
    """How it ended. status: of the program, as wait(2) gives it, None if it was never started."""

    summary: dict[str, Any]
    status: int | None
    exec_errno: int = 0
    notes: list[str] = field(default_factory=list)


class _Spooler(threading.Thread):
    # Converts segments. Stops at the first error (a full disk), which is then the recording's.
    def __init__(
        self, recording: BpfRecording | PerfRecording, writer: CaptureWriter, part_bytes: int
    ) -> None:
        super().__init__(name="pagelens-spool", daemon=True)
        self._recording, self._writer = recording, writer
        self._part_bytes = part_bytes
        self._ask = threading.Event()
        self.error: OSError | None = None
        self.pending: list[tuple[int, int | None, str, Snapshot]] = []

    def run(self) -> None:
        last = time.monotonic()
        while not self._ask.wait(0.25):
            full = self._recording.stats().segment_bytes > self._part_bytes
            if full or time.monotonic() - last > PART_SECONDS:
                last = time.monotonic()
                self.convert(self._recording.drain.rotate())

    def convert(self, segment: int) -> None:
        """One segment and the snapshots that wait."""
        if self.error is not None:
            return
        try:
            self._writer.add_segment(segment)
            while self.pending:
                number, mm, moment, snap = self.pending.pop(0)
                for table, rows in snapshots.to_tables(number, mm, moment, snap).items():
                    self._writer.write(table, rows, part=number)
        except OSError as error:
            self.error = error

    def finish(self) -> None:
        """End the thread, convert the rest."""
        self._ask.set()
        if self.is_alive():
            self.join()
        self.convert(self._recording.drain.stop())


def _open(method: str, options: Options, spool: Path) -> tuple[BpfRecording | PerfRecording, str]:
    # The best that works here; what it cannot see is in options.absent.
    if method != "perf":
        try:
            return BpfRecording(options, spool), "bpf"
        except CapabilityMissingError:
            if method == "bpf":
                raise
    return PerfRecording(options, spool), "perf"


class _StopWaiting(Exception):
    # Ctrl-C after the program has ended, while others of its tree run on.
    pass


class Recorder:
    """Records one program. Use once."""

    def __init__(
        self, path: Path, settings: Settings, *, command: Sequence[str], force: bool = False
    ) -> None:
        """Makes the capture and loads the recorder, before anything is started.

        CapabilityMissingError, UsageError: nothing was started.
        """
        self._settings = settings
        self._command = list(command)
        self._snapshots = 0
        self._snapshot_losses = 0
        self._interrupted = False
        self._root_gone = False
        meta = {
            "pagelens": __version__,
            "status": "recording",
            "command": self._command,
            "started": time.time(),
            "started_ns": time.monotonic_ns(),
            "kernel": " ".join(os.uname()[i] for i in (0, 2, 3, 4)),
            "settings": memory_settings(),
            "detail": settings.detail,
            "snapshot": settings.snapshot,
            "ring_size": settings.ring_size,
        }
        self._writer = CaptureWriter(path, meta, force=force, max_size=settings.max_size)
        switches = settings.switches if settings.switches is not None else settings.detail != "lean"
        options = Options(detail=settings.detail, ring_size=settings.ring_size, switches=switches)
        try:
            recording, method = _open(settings.method, options, self._writer.spool)
        except BaseException:
            import shutil

            shutil.rmtree(path, ignore_errors=True)
            raise
        self._recording: BpfRecording | PerfRecording = recording
        self._writer.write_meta(method=method, absent=options.absent)
        self._spooler = _Spooler(
            self._recording, self._writer, min(PART_BYTES, settings.max_size or PART_BYTES)
        )

    def run(self, path: str, argv: Sequence[str]) -> Result:
        """Start `path`, wait, write the summary."""
        program = HeldProgram(path, argv)
        self._program = program
        handlers = self._install_handlers()
        try:
            self._recording.arm(program.pid)
            self._spooler.start()
            if self._settings.snapshot == "none":
                program.release()
                status = self._wait()
            else:
                perf = self._recording if isinstance(self._recording, PerfRecording) else None
                tracer = Tracer(
                    program.pid, self._at_exec, self._at_exit, perf.at_task_exit if perf else None
                )
                program.release()
                status = self._trace(tracer)
            exec_errno = program.exec_error()
            summary = self._finish()
        except BaseException:
            program.abandon()
            self._recording.close()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(summary, status, exec_errno, self._notes)

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

    def _wait(self) -> int:
        _, status = os.waitpid(self._program.pid, 0)
        self._root_gone = True
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
        self._take(pid, "exec")

    def _at_exit(self, pid: int) -> None:
        self._take(pid, "exit")

    def _take(self, pid: int, moment: str) -> None:
        full = self._settings.snapshot == "full"
        try:
            mm = self._recording.mm_of(pid)
            snap = live.take(pid, pages=full, accounting=full)
        except (PagelensError, OSError):
            self._snapshot_losses += 1
            return
        self._snapshots += 1
        self._spooler.pending.append((self._snapshots, mm, moment, snap))

    # -- the end

    def _finish(self) -> dict[str, Any]:
        recording, writer = self._recording, self._writer
        running = recording.collect() if isinstance(recording, BpfRecording) else b""
        rows = [convert.task_row(row, alive=True) for row in np.frombuffer(running, records.BARE_CALL)]
        alive = 0 if isinstance(recording, BpfRecording) else max(0, recording.live_tasks())
        recording.detach()
        self._spooler.finish()
        stats, totals = recording.stats(), recording.totals()
        error = self._spooler.error
        ended = Ended(
            totals=totals,
            drained=int(stats.faults),
            dropped_faults=int(stats.dropped_faults),
            dropped_others=int(stats.dropped_others),
            damaged=int(stats.damaged),
            written=writer.recorded,
            dropped_rows=writer.dropped_rows,
            alive=alive,
            snapshot_losses=self._snapshot_losses,
            error=(error.errno or errno.EIO) if error else int(stats.error),
            lean=self._settings.detail == "lean",
            perf=isinstance(recording, PerfRecording),
            kernel_visible=not isinstance(recording, PerfRecording) or recording.kernel,
        )
        lost = losses(ended)
        self._notes = [f"{count:,} {note}" for _, count, note in lost]
        summary = balance(ended)
        if rows:
            self._notes.append(f"{len(rows):,} tasks run on; they were recorded until now")
        try:
            if rows:
                writer.write("tasks", rows, part=_ALIVE_PART)
            for what, count, note in lost:
                writer.lose(what, count, note)
            writer.finish(
                status=summary["status"],
                summary=summary,
                ended_ns=time.monotonic_ns(),
                rows=writer.next_seq,
                high_water=int(stats.high_water),
            )
        except OSError:
            pass  # the disk is full: meta.json still says "recording", and `recover` does the rest
        recording.close()
        return summary
