"""Areas: the vmas of one address space while calls are replayed over it (`spaces`)."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.capture.reader import Capture
from pagelens.vm.vma import Vma, VmaList

# VmFlags that calls set; all others follow from rights and file. "ac" (VM_ACCOUNT) comes with a private
# writable mapping and stays when it is made read-only, if it was written: that keeps relro apart from rodata.
_KEPT = frozenset(
    ("lo", "lf", "hg", "nh", "dc", "dd", "wf", "sr", "rr", "nr", "gd", "mg", "ht", "um", "uw", "ac")
)
# A fault this far below a growing stack is its growth (the limit decides, not the distance).
_STACK_GAP = 1 << 30


@dataclass(frozen=True, slots=True)
class Area:
    """A vma at some time. made_by: seq of the call that mapped it, -1: there from the start. stack:
    MAP_STACK."""

    vma: Vma
    made_by: int = -1
    stack: bool = False


class Space:
    """The areas of one mm, sorted, without overlap. Mutable."""

    def __init__(self, areas: list[Area] | None = None) -> None:
        self.areas = areas or []
        self.starts = [a.vma.start for a in self.areas]
        self.brk = 0

    def copy(self) -> Space:
        """What a fork child has: without DONTFORK ranges, nothing locked."""
        kept = []
        for area in self.areas:
            flags = area.vma.vm_flags or frozenset()
            if "dc" in flags:
                continue
            if flags & {"lo", "lf"}:
                area = replace(area, vma=area.vma.replaced(vm_flags=flags - {"lo", "lf"}))  # noqa: PLW2901 (the copy)
            kept.append(area)
        out = Space(kept)
        out.brk = self.brk
        return out

    def index(self, addr: int) -> int:
        """Index of the area that holds `addr`, or -1."""
        i = bisect.bisect_right(self.starts, addr) - 1
        return i if i >= 0 and addr < self.areas[i].vma.end else -1

    def _set(self, low: int, high: int, areas: list[Area]) -> None:
        self.areas[low:high] = areas
        self.starts[low:high] = [a.vma.start for a in areas]

    def cut(self, start: int, end: int) -> list[Area]:
        """Take [start, end) out; returns what was there, cut to it."""
        low = bisect.bisect_right(self.starts, start) - 1
        if low < 0 or self.areas[low].vma.end <= start:
            low += 1
        high = bisect.bisect_left(self.starts, end)
        out, left = [], []
        for area in self.areas[low:high]:
            v = area.vma
            if v.start < start:
                left.append(replace(area, vma=v.replaced(end=start)))
            if v.end > end:
                left.append(replace(area, vma=shifted(v, end)))
            inner = shifted(v, start) if v.start < start else v
            out.append(replace(area, vma=inner.replaced(end=min(v.end, end))))
        self._set(low, high, left)
        return out

    def put(self, area: Area) -> None:
        """Insert into free space, joined with equal neighbours."""
        i = bisect.bisect_left(self.starts, area.vma.start)
        low = high = i
        if i and _mergeable(self.areas[i - 1].vma, area.vma):
            low = i - 1
            area = replace(self.areas[low], vma=self.areas[low].vma.replaced(end=area.vma.end))
        if i < len(self.areas) and _mergeable(area.vma, self.areas[i].vma):
            high = i + 1
            area = replace(area, vma=area.vma.replaced(end=self.areas[i].vma.end))
        self._set(low, high, [area])

    def change(self, start: int, end: int, **fields: Any) -> None:
        """New fields of what is in [start, end); or `set` and `clear`, frozensets of VmFlags."""
        for area in self.cut(start, end):
            v = area.vma
            if "set" in fields:
                flags = (v.vm_flags or frozenset()) - fields["clear"] | fields["set"]
                v = v.replaced(vm_flags=flags)
            else:
                v = v.replaced(**fields)
            self.put(replace(area, vma=v))


def shifted(vma: Vma, start: int) -> Vma:
    """The vma from `start` on, its file offset moved along."""
    offset = vma.offset + start - vma.start if vma.inode else 0
    return vma.replaced(start=start, offset=offset)


def _mergeable(a: Vma, b: Vma) -> bool:
    if a.end != b.start or a.prot != b.prot or a.shared != b.shared or a.vm_flags != b.vm_flags:
        return False
    if (a.dev, a.inode, a.name) != (b.dev, b.inode, b.name) or a.name.startswith("[v"):
        return False
    return not a.inode or a.offset + a.size == b.offset


def find(space: Space, addr: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Index of the area of each address in this state of the space, -1 where there is none.

    An address below a stack that grows belongs to the stack: the fault there makes it grow.
    """
    if not space.areas:
        return np.full(len(addr), -1, dtype=np.int64)
    starts = np.array(space.starts, dtype=np.uint64)
    ends = np.array([a.vma.end for a in space.areas], dtype=np.uint64)
    index = np.searchsorted(starts, addr, side="right").astype(np.int64) - 1
    inside = (index >= 0) & (addr < ends[np.maximum(index, 0)])
    out = np.where(inside, index, -1)
    for i, area in enumerate(space.areas):
        if area.vma.name == "[stack]" or "gd" in (area.vma.vm_flags or ()):
            below = ~inside & (index == i - 1) & (addr + np.uint64(_STACK_GAP) > starts[i])
            out[below] = i
    return out


def space_of(vmas: VmaList) -> Space:
    """A space that begins as a snapshot shows it."""
    space = Space(
        [Area(v.replaced(vm_flags=None if v.vm_flags is None else v.vm_flags & _KEPT)) for v in vmas]
    )
    heap = next((v for v in vmas if v.name == "[heap]"), None)
    space.brk = heap.end if heap else 0
    return space


class RecordedVmas:
    """The table `vmas`, read once; lists by snapshot are made when asked for.

    paths: (dev, inode) -> path of every mapped file. segments: SysV segment id -> bytes.
    """

    def __init__(self, capture: Capture) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        table = capture.table("vmas")
        self._table = table
        snapshot = table.column("snapshot").to_numpy()
        self._rows = np.argsort(snapshot, kind="stable")
        self._snapshot = snapshot[self._rows]
        named = table.select(["dev", "inode", "name"]).group_by(["dev", "inode", "name"], use_threads=False)
        files = named.aggregate([]).to_pylist()
        self.paths = {(r["dev"], r["inode"]): r["name"] for r in files if r["inode"]}
        self.segments: dict[int, int] = {}  # SysV segment -> bytes
        sysv = pc.starts_with(pc.cast(table.column("name"), pa.string()), "/SYSV")
        for row in table.filter(sysv).select(["inode", "start", "end"]).to_pylist():
            self.segments[row["inode"]] = row["end"] - row["start"]

    def of(self, snapshot: int) -> VmaList:
        """The list of one snapshot; empty for a number that is not there."""
        low, high = np.searchsorted(self._snapshot, [snapshot, snapshot + 1])
        out = []
        for v in self._table.take(self._rows[low:high]).to_pylist():
            prot, shared = Vma.parse_perms(v["perms"])
            flags = None if v["vm_flags"] is None else frozenset(v["vm_flags"].split())
            out.append(
                Vma(v["start"], v["end"], prot, shared, v["offset"], v["dev"], v["inode"], v["name"], flags)
            )
        return VmaList(out)
