"""`--follow`: a process and its descendants, each with a tracker of its own.

Children are found between looks (/proc/PID/task/TID/children), so what a child writes before it is found is
listed with everything else it holds, as NEW; one that lives and dies between two looks is counted only where
its number shows (its parent's later children tell nothing), which the notes say. Rejected: PTRACE_O_TRACEFORK
on every target (debuggers inside stop working); EVENT_FORK of userfaultfd (blocks fork until we answer).
"""

from __future__ import annotations

from collections.abc import Callable

from pagelens.dirty.epoch import Epoch
from pagelens.dirty.track import Tracker
from pagelens.linux.procfs import Process
from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError, UsageError


class Family:
    """Trackers of the descendants of process `root`, and of itself where `tracker` is given. make(pid) starts
    one whose first look lists all that it holds."""

    def __init__(self, root: int, make: Callable[[int], Tracker], tracker: Tracker | None = None) -> None:
        self._make = make
        self._members: dict[int, Tracker] = {} if tracker is None else {root: tracker}
        self._root = root
        self._with_root = tracker is not None
        self._refused: dict[int, str] = {}

    def looks(self) -> list[Epoch]:
        """One epoch for each member, an incomplete one for each that has ended since; new children first join.
        Raises TargetGoneError when all are gone."""
        if self._with_root and not self._members:
            raise TargetGoneError(f"process {self._root} and its children have ended")
        self._join()
        out = []
        for pid, tracker in list(self._members.items()):
            try:
                out.append(tracker.epoch())
            except TargetGoneError:
                out.append(
                    tracker.lost("it has ended: what it wrote since it was last looked at is not known")
                )
                tracker.close()
                del self._members[pid]
        return out

    @property
    def refused(self) -> dict[int, str]:
        """Children that could not be watched, with the reason."""
        return dict(self._refused)

    def _join(self) -> None:
        queue = list({self._root, *self._members})
        while queue:
            for child in children(queue.pop()):
                if child in self._members or child in self._refused:
                    continue
                try:
                    self._members[child] = self._make(child)
                except (TargetGoneError, UsageError):
                    continue
                except (CapabilityMissingError, PagelensError) as error:
                    self._refused[child] = str(error)
                    continue
                queue.append(child)

    def close(self) -> None:
        """Stop watching all of them."""
        for tracker in self._members.values():
            tracker.close()
        self._members.clear()


def children(pid: int) -> list[int]:
    """Process ids of the direct children; [] where the process is gone or the kernel does not say."""
    try:
        with Process.open(pid) as proc:
            out = []
            for tid in proc.tasks():
                try:
                    out += [int(word) for word in proc.read_task(tid, "children").split()]
                except (TargetGoneError, CapabilityMissingError):
                    continue
            return out
    except (TargetGoneError, UsageError, CapabilityMissingError):
        return []
