"""`dirty -- CMD`: every page that a program writes during its run, from its first instruction to its exit.

The program is held at exec, armed before it has written anything, looked at every `interval` seconds and once
more when its leader is about to exit, with its memory still there. What the kernel wrote before the start
(arguments, environment, auxiliary vector) is no write of the program.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pagelens.dirty.epoch import Epoch
from pagelens.dirty.follow import Family
from pagelens.dirty.track import Tracker
from pagelens.linux.launch import Launched
from pagelens.linux.procfs import Process
from pagelens.vm.errors import PagelensError

Make = Callable[[int], Tracker]


class CommandRun:
    """Runs `argv`; iterate for its epochs; then `status` is its wait status. make(pid) makes a tracker in the
    thread that holds the program (with traced=True); make_child(pid), where given, those of children."""

    def __init__(
        self, argv: Sequence[str], make: Make, interval: float | None, make_child: Make | None = None
    ) -> None:
        self._make = make
        self._interval = interval
        self._lock = threading.Lock()
        self._tracker: Tracker | None = None
        self._queue: queue.Queue[Epoch] = queue.Queue()
        self._count = 0
        self._note: tuple[str, ...] = ()
        self.status: int | None = None
        self._family: Family | None = None
        self._run = Launched(argv, self._on_exec, self._on_exit)
        self.pid = self._run.pid
        if make_child is not None:
            self._family = Family(self.pid, make_child)

    @property
    def tracker(self) -> Tracker | None:
        """The tracker of the image that runs now."""
        return self._tracker

    def __iter__(self) -> Iterator[Epoch]:
        due = time.monotonic()
        while self.status is None:
            due += self._interval or 3600.0
            while self.status is None and (left := due - time.monotonic()) > 0:
                self.status = self._run.wait(left)
            if self.status is None:
                self._look()
            while not self._queue.empty():
                yield self._queue.get()
            if self.status is None and self._family is not None:
                yield from self._family.looks()

    def stop_tracking(self) -> None:
        """Let the program go on unwatched (as after --count)."""
        if self._family is not None and threading.current_thread() is threading.main_thread():
            self._family.close()
        with self._lock:
            if self._tracker is not None:
                self._tracker.close()
                self._tracker = None

    def wait(self) -> int:
        """The program's wait status, when it has ended."""
        while self.status is None:
            self.status = self._run.wait()
        return self.status

    def _look(self, *more: str, whole: bool = True, last: bool = False) -> None:
        with self._lock:
            if self._tracker is None:
                return
            try:
                epoch = self._tracker.epoch()
            except PagelensError as error:
                # Between exec and its stop the old image is gone and the new one not yet ours; the exec stop
                # makes a new tracker. But at the exit there is no later look that would list what this one lost.
                if not last:
                    return
                epoch = self._tracker.lost(
                    f"the look at the exit failed, what was written since the one before is not known: {error}"
                )
            whole = whole and epoch.complete and not self._note
            notes = (*epoch.notes, *self._note, *more)
            self._queue.put(replace(epoch, epoch=self._count, notes=notes, complete=whole))
            self._count += 1
            self._note = ()

    def _on_exec(self, pid: int) -> None:
        with self._lock:
            if self._tracker is not None:
                self._tracker.close()
                self._tracker = None
                self._note = ("exec: what the image before wrote after the last look is not known",)
            elif self._count:
                return  # --count is reached: no longer watched
            self._tracker = self._make(pid)

    def _on_exit(self, pid: int) -> None:
        notes, children = [], 0
        try:
            with Process.open(pid) as proc:
                others = [t for t in proc.tasks() if t != pid and proc.stat(t).state not in "ZX"]
                children = proc.stat().cmin_flt  # of those that were waited for
        except PagelensError:
            others = []
        if others:
            notes.append(f"the leader exits while {len(others)} threads have not ended yet")
        if children and self._family is not None:
            notes.append("what children wrote after the last look before their end is not known")
        elif children:
            notes.append("children are not watched (--follow)")
        self._look(*notes, whole=not children or self._family is None, last=True)
        self.stop_tracking()
