"""Record processes that run already: mark their tasks, wait, unmark them.

The tasks are marked by one pass over all tasks in the kernel; whoever was started meanwhile by a task that was not
marked yet is found by the next pass, and passes are made until one finds nobody. A task that is found late has lost
nothing of the equation: its counters are taken when it is marked.
Nothing is put into the target: no ptrace, no breakpoint. Without BPF, perf events are opened for each thread.
When we are killed the kernel drops the programs.
"""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pagelens.capture.session import Session, Settings
from pagelens.linux.perf_recording import PerfRecording
from pagelens.linux.procfs import Process
from pagelens.linux.recording import BpfRecording
from pagelens.linux.tree import descendants, parents
from pagelens.vm.errors import PagelensError, TargetGoneError

_MAX_PASSES = 20


@dataclass(frozen=True, slots=True)
class Attached:
    """How it ended. tasks: that ran when we attached; passes: over the tasks until all were found."""

    summary: dict[str, Any]
    notes: list[str]
    tasks: int
    passes: int


def attach(
    path: Path,
    settings: Settings,
    pid: int,
    *,
    duration: float | None = None,
    tree: bool = False,
    force: bool = False,
) -> Attached:
    """Record `pid` until it is gone, `duration` seconds have passed, or SIGINT or SIGTERM comes.

    tree: also what it has started already (what it starts from now on follows in any case).
    TargetGoneError, UsageError (a kernel thread), CapabilityMissingError: nothing was recorded.
    """
    with Process.open(pid) as target:
        command = [f"attach {pid} ({target.stat().comm})"]
        session = Session(path, settings, command=command, force=force)
        # Remembered from here on: Ctrl-C while tasks are still being found ends the recording, with its report.
        asked: list[int] = []

        def stop(number: int, _frame: FrameType | None) -> None:
            asked.append(number)

        old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            tasks, passes = _record(session, target, duration, tree, asked)
            summary = session.finish()
        except BaseException:
            session.abandon()
            raise
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        return Attached(summary, session.notes, tasks, passes)


def _record(
    session: Session, target: Process, duration: float | None, tree: bool, asked: list[int]
) -> tuple[int, int]:
    # (tasks found, passes). asked: signals that came meanwhile, which end it.
    recording = session.recording
    session.attached = True
    session.start()
    tasks = passes = 0
    while passes < _MAX_PASSES:
        try:
            new = recording.adopt(descendants([target.pid]) if tree else [target.pid])
        except PagelensError:  # refused: there is nothing to keep
            session.abandon()
            shutil.rmtree(session.writer.path, ignore_errors=True)
            raise
        passes += 1
        tasks += new
        if not new:
            break
    if not tasks:
        session.abandon()
        shutil.rmtree(session.writer.path, ignore_errors=True)
        raise TargetGoneError(f"process {target.pid} is gone (or is exiting)")
    if session.settings.snapshot != "none":
        family = parents([target.pid]) if tree else {target.pid: 0}
        session.take_tree(list(family), "attach")
        # Who shares what by forks before us, `why` tells by frames, and who is whose child by this.
        session.writer.write_meta(parents={str(pid): parent for pid, parent in family.items() if parent})
    _wait(recording, duration, asked)
    if session.settings.snapshot != "none" and target.alive:
        session.take_tree(descendants([target.pid]) if tree else [target.pid], "detach")
    if isinstance(recording, PerfRecording) and not recording.events:
        session.notes.append("what it starts is not followed: neither BPF nor perf is allowed here")
    return tasks, passes


def _wait(recording: BpfRecording | PerfRecording, duration: float | None, asked: list[int]) -> None:
    until = None if duration is None else time.monotonic() + duration
    while recording.live_tasks() > 0 and not asked:
        left = 0.05 if until is None else min(0.05, until - time.monotonic())
        if left <= 0:
            return
        time.sleep(left)
