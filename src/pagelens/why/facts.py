"""Facts: what the replay reads of a capture, as columns for faults and small records for everything rarer.

A million faults are columns (about 50 bytes each); calls and task events are thousands and are objects,
because the replay walks them one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageRuns
from pagelens.vm.snapshot import Snapshot

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Faults:
    """Fault events, any order. time: ns, done (entered, for a failed one). latency: ns, -1 unknown.
    Numbers that fit are int32 or int16 in practice (a million rows are 60 MB so).
    error: x86 error code, -1 unknown. call: system call number, -1 outside of one. new: pages that the kernel took for
    a write to a present page, -1 unknown."""

    seq: I64
    time: I64
    latency: I64
    mm: I64
    tid: I64
    addr: U64
    ip: U64
    error: I64
    call: I64
    user: Bool
    major: Bool
    failed: Bool
    new: I64

    def __len__(self) -> int:
        return len(self.seq)

    def take(self, index: I64) -> Faults:
        """The rows of `index`, in its order."""
        return Faults(*(getattr(self, name)[index] for name in FAULT_COLUMNS))


FAULT_COLUMNS = (
    "seq",
    "time",
    "latency",
    "mm",
    "tid",
    "addr",
    "ip",
    "error",
    "call",
    "user",
    "major",
    "failed",
    "new",
)


@dataclass(frozen=True, slots=True)
class Call:
    """A system call. start, end: ns, entered and returned (equal where the end is unknown)."""

    seq: int
    start: int
    end: int
    mm: int
    tid: int
    name: str
    args: tuple[int, ...]
    result: int
    gup: int = 0
    detail: str = ""
    dev: int = 0
    inode: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """A task event: fork (child_pid, child_tid, clone_flags, child_mm), exec (old_mm, new_mm), exit."""

    seq: int
    time: int
    mm: int
    pid: int
    tid: int
    name: str
    args: tuple[int, ...]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FrameShot:
    """The frames of the anonymous pages of an address space that had just forked. start, until: ns, of its reading."""

    mm: int
    start: int
    until: int
    pages: PageRuns


class CachedRun(NamedTuple):
    """Pages [start, end) of a file (dev as in maps, inode) that a snapshot found in the page cache at `time` (ns)."""

    file: tuple[str, int]
    start: int
    end: int
    time: int


@dataclass(frozen=True, slots=True)
class Facts:
    """One capture. first, last: snapshots by mm (last is taken at the exit stop). settings: as meta.json has
    them (`numa_balancing`, `thp`, …; absent = unknown). ran: (mm, ns) of switches onto a CPU, int64[n, 2].
    dropped_before: ns before which events may have been dropped (--max-size), -1 where none were. frames: of address
    spaces that forked. cached: what snapshots found in the page cache."""

    faults: Faults
    calls: tuple[Call, ...] = ()
    tasks: tuple[Task, ...] = ()
    first: Mapping[int, Snapshot] = field(default_factory=dict)
    last: Mapping[int, Snapshot] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    ran: I64 = field(default_factory=lambda: np.empty((0, 2), np.int64))
    dropped_before: int = -1
    frames: tuple[FrameShot, ...] = ()
    cached: tuple[CachedRun, ...] = ()
