"""Faults of execve are of the new address space, though the recorder gives it its number only afterwards."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pagelens.vm.snapshot import Snapshot
from pagelens.why.facts import Facts, Faults, Task

Bool = npt.NDArray[np.bool_]
EXECVE = (59, 322)


def with_new_mm(facts: Facts) -> Faults:
    """execve works on the new address space before the recorder gives it its number: those faults move."""
    faults = facts.faults
    execs = [t for t in facts.tasks if t.name == "exec"]
    in_exec = np.flatnonzero(in_execve(faults) & ~faults.user)
    if not execs or not len(in_exec):
        return faults
    mm = faults.mm.copy()
    moved = False
    by_tid: dict[int, list[Task]] = defaultdict(list)
    for task in sorted(execs, key=lambda t: t.time):
        by_tid[int(task.args[2]) if len(task.args) > 2 and task.args[2] else task.tid].append(task)
    for i in in_exec.tolist():
        after = by_tid.get(int(faults.tid[i]), [])
        at = bisect.bisect_left([t.time for t in after], int(faults.time[i]))
        if at < len(after) and int(after[at].args[0]) == int(mm[i]) != int(after[at].args[1]):
            new = int(after[at].args[1])
            if _holds(facts.first, new, int(faults.addr[i])):
                mm[i] = new
                moved = True
    if not moved:
        return faults
    columns = {name: getattr(faults, name) for name in faults.__dataclass_fields__}
    return Faults(**(columns | {"mm": mm}))


def in_execve(faults: Faults) -> Bool:
    """bool[n]: taken in execve or execveat."""
    return np.asarray((faults.call == EXECVE[0]) | (faults.call == EXECVE[1]))


def in_order(faults: Faults) -> bool:
    """Whether faults ascend by (mm, time)."""
    mm, time = faults.mm, faults.time
    return bool(np.all((mm[1:] > mm[:-1]) | ((mm[1:] == mm[:-1]) & (time[1:] >= time[:-1]))))


def _holds(first: Mapping[int, Snapshot], mm: int, addr: int) -> bool:
    snapshot = first.get(mm)
    return snapshot is None or snapshot.vmas.find(addr) is not None
