"""One recording, whatever starts it: the capture, the live recording, the thread that writes parts, the end.

`recorder` (a program from its execve on) and `attach` (processes that run already) drive it. The drain is C;
one Python thread turns finished spool segments into Parquet every few seconds. A failure of ours (a full
disk) stops the recording, never the program.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pagelens import __version__
from pagelens.capture import convert, jitmaps, records, snapshots
from pagelens.capture.balance import Ended, balance, losses
from pagelens.capture.forkframes import ForkFrames
from pagelens.capture.store import CaptureWriter
from pagelens.linux import residency
from pagelens.linux import snapshot as live
from pagelens.linux.perf_recording import PerfRecording
from pagelens.linux.procfs import Process
from pagelens.linux.recording import BpfRecording, Options
from pagelens.linux.residency import FilePages
from pagelens.linux.settings import memory_settings
from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError
from pagelens.vm.snapshot import Snapshot

PART_SECONDS = 3.0
PART_BYTES = 48 << 20
_ALIVE_PART = 99_999_998  # behind the parts of all segments


@dataclass
class Settings:
    """What `run` was asked for. max_size: bytes of events to keep, 0 for all. until: "tree" or "program"."""

    detail: str = "normal"
    snapshot: str = "full"
    ring_size: int = 0  # bytes per CPU; 0: by the number of CPUs
    max_size: int = 0
    until: str = "tree"
    switches: bool | None = None  # None: with normal and full
    method: str = "auto"  # or bpf, perf
    calls: str = "auto"  # or ptrace: told by a tracer (method perf)


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
        self.pending: list[snapshots.Shot | snapshots.FrameShot] = []

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
            try:
                self._writer.add_segment(segment)
            except OSError as error:
                if error.errno != errno.ENOSPC or not self._writer.release(all_of_it=False):
                    raise
                self._writer.add_segment(segment)
            # One part for all that wait: a tree of many short processes has many snapshots.
            shots = [self.pending.pop(0) for _ in range(len(self.pending))]
            for table, rows in snapshots.to_tables(shots).items():
                self._writer.write(table, rows, part=shots[0].number)
        except OSError as error:
            self.error = error
        except Exception as error:
            # A thread that dies would say so in the middle of the program's output, and nobody would convert the
            # rest. The spool keeps what was not converted, for `recover`.
            self.error = OSError(errno.EIO, f"{type(error).__name__}: {error}")

    def cancel(self) -> None:
        """End the thread."""
        self._ask.set()
        if self.is_alive():
            self.join()

    def finish(self) -> None:
        """End the thread, convert the rest."""
        self.cancel()
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


class Session:
    """A capture that is being recorded. notes: sentences for the user, filled by `finish`."""

    def __init__(
        self, path: Path, settings: Settings, *, command: Sequence[str], force: bool = False
    ) -> None:
        """Makes the capture and loads the recorder, before anything is started.

        CapabilityMissingError, UsageError: nothing was started, nothing is left.
        """
        self.settings = settings
        self.notes: list[str] = []
        self.attached = False  # to processes that may outlive the recording
        self._snapshots = 0
        self._snapshot_losses = 0
        self._fork_frames = ForkFrames()
        meta = {
            "pagelens": __version__,
            "status": "recording",
            "command": list(command),
            "started": time.time(),
            "started_ns": time.monotonic_ns(),
            "kernel": " ".join(os.uname()[i] for i in (0, 2, 3, 4)),
            "settings": memory_settings(),
            "detail": settings.detail,
            "snapshot": settings.snapshot,
            "ring_size": settings.ring_size,
        }
        self.writer = CaptureWriter(path, meta, force=force, max_size=settings.max_size)
        switches = settings.switches if settings.switches is not None else settings.detail != "lean"
        options = Options(
            detail=settings.detail,
            ring_size=settings.ring_size,
            switches=switches,
            calls=settings.calls == "ptrace",
        )
        try:
            recording, method = _open(settings.method, options, self.writer.spool)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self.recording: BpfRecording | PerfRecording = recording
        seen = not isinstance(recording, PerfRecording) or recording.events
        calls = "bpf" if method == "bpf" else "ptrace" if options.calls else "mmap2" if seen else "none"
        self.writer.write_meta(method=method, calls=calls, absent=options.absent, ring_size=options.ring_size)
        part_bytes = min(PART_BYTES, settings.max_size or PART_BYTES)
        self._spooler = _Spooler(self.recording, self.writer, part_bytes)

    def start(self) -> None:
        """Begin to write parts."""
        self._spooler.start()

    def without_stops(self) -> None:
        """Nothing may stop the program here, so no snapshot is taken."""
        self.settings.snapshot = "none"
        absent = [*self.writer.meta.get("absent", []), "snapshots"]
        self.writer.write_meta(snapshot="none", absent=absent)
        self.notes.append("ptrace is not allowed here: no snapshots (see pagelens doctor)")

    def take_tree(self, pids: Sequence[int], moment: str) -> None:
        """A snapshot of each address space of running processes. The first is the one that was asked for; of the others
        those that end meanwhile are no loss, nor are those that are not recorded."""
        seen: set[int | None] = {None}
        for pid in pids:
            try:
                mm = self.recording.mm_of(pid)
            except (PagelensError, OSError):
                mm = None
            if mm not in seen or pid == pids[0]:
                seen.add(mm)
                self.take(pid, moment, may_end=pid != pids[0])

    def take(self, pid: int, moment: str, may_end: bool = False) -> None:
        """A snapshot of a process; one that cannot be taken is counted as a loss, unless it has ended, and may have."""
        full = self.settings.snapshot == "full"
        try:
            mm = self.recording.mm_of(pid)
            try:
                snap, files = _read(pid, full)
            except TargetGoneError:  # the leader dropped its mm just now: another thread still has it
                snap, files = _read(pid, full)
        except (PagelensError, OSError) as error:
            self._snapshot_losses += not (
                may_end and isinstance(error, (TargetGoneError, ProcessLookupError))
            )
            return
        self._snapshots += 1
        self._spooler.pending.append(snapshots.Shot(self._snapshots, mm, moment, snap, files))

    def take_frames(self, pid: int) -> None:
        """Which frames a process has that has just forked: with those at the end, they tell what was copied since.

        Left out where frames are hidden and where it would take too long; what it decides is then open.
        """
        found = self._fork_frames.take(pid)
        if found is None:
            return
        try:
            mm = self.recording.mm_of(pid)
        except (PagelensError, OSError):
            return
        if mm is None:
            return
        self._snapshots += 1
        self._spooler.pending.append(snapshots.FrameShot(self._snapshots, mm, *found))

    def finish(self) -> dict[str, Any]:
        """Detach, convert the rest, draw up the balance; returns the summary."""
        recording, writer = self.recording, self.writer
        running, still = b"", 0
        if isinstance(recording, BpfRecording):
            running = recording.collect()
        elif self.attached:
            still = recording.collect()
        rows = [convert.task_row(row, alive=True) for row in np.frombuffer(running, records.BARE_CALL)]
        alive = max(0, recording.live_tasks())
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
            dropped_written=writer.dropped_faults,
            alive=alive,
            snapshot_losses=self._snapshot_losses,
            error=(error.errno or errno.EIO) if error else int(stats.error),
            lean=self.settings.detail == "lean",
            perf=isinstance(recording, PerfRecording),
            calls=self.settings.calls == "ptrace",
            stops=self.attached or self.settings.snapshot != "none",
            events=not isinstance(recording, PerfRecording) or recording.events,
            kernel_visible=not isinstance(recording, PerfRecording) or recording.kernel,
        )
        if error and error.errno == errno.EIO:
            self.notes.append(f"parts could not be written: {error.strerror}")
        lost = losses(ended)
        self.notes += [f"{count:,} {note}" for _, count, note in lost]
        self.notes += [note for note in (self._fork_frames.note(),) if note]
        summary = balance(ended)
        if rows or still:
            self.notes.append(f"{len(rows) or still:,} tasks run on; they were recorded until now")
        last: dict[str, Any] = {
            "status": summary["status"],
            "summary": summary,
            "ended_ns": time.monotonic_ns(),
            "rows": writer.next_seq,
            "high_water": int(stats.high_water),
        }
        writer.release(all_of_it=True)
        try:
            if rows:
                writer.write("tasks", rows, part=_ALIVE_PART)
            for what, count, note in lost:
                writer.lose(what, count, note)
            with contextlib.suppress(PagelensError):  # names only: never a reason to lose the recording
                jitmaps.keep(writer.path)
            writer.finish(**last)
        except OSError:
            # Else meta.json still says "recording", and `recover` does the rest.
            with contextlib.suppress(OSError):
                writer.write_meta(**last)
        recording.close()
        return summary

    def abandon(self) -> None:
        """Detach and free; the capture stays as it is."""
        self._spooler.cancel()  # it must not ask a drain that is freed
        self.recording.close()


def _read(pid: int, full: bool) -> tuple[Snapshot, tuple[FilePages, ...]]:
    # Full: also what the page cache holds of the mapped files, which decides what later faults map.
    with Process.open(pid) as proc:
        snap = live.take(proc, pages=full, accounting=full, pfns=full)
        if not full:
            return snap, ()
        files, refused = residency.read(proc, snap.vmas)
    if refused:
        note = f"{refused} mapped files could not be asked for their cached pages"
        snap = replace(snap, notes=(*snap.notes, note))
    return snap, tuple(files)
