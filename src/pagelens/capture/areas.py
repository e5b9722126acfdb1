"""Areas: the vmas of one address space while calls are replayed over it (`spaces`).

What is put in and taken out; what the kernel then merges or keeps apart is in `merging`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pagelens.capture.reader import Capture
from pagelens.vm.vma import Vma, VmaList

# VmFlags that calls set; all others follow from rights and file. "ac" (VM_ACCOUNT) comes with a private
# writable mapping and stays when it is made read-only, if it was written: that keeps relro apart from rodata.
_KEPT = frozenset("lo lf hg nh dc dd wf sr rr nr gd mg ht um uw ui ac sl io de pf mm".split())  # noqa: SIM905 (a table)
# A fault this far below a growing stack is its growth (the limit decides, not the distance).
_STACK_GAP = 1 << 30


@dataclass(frozen=True, slots=True)
class Area:
    """A vma at some time. made_by: seq of the call that mapped it, -1: there from the start. stack:
    MAP_STACK. anon: number of its anon_vma, 0: none (never written). forked: that anon_vma is chained to a
    parent's. shift: bytes by which a moved anonymous area's page offset is ahead of its address."""

    vma: Vma
    made_by: int = -1
    stack: bool = False
    anon: int = 0
    forked: bool = False
    shift: int = 0


class Space:
    """The areas of one mm, sorted, without overlap. Mutable. brk: the program break, 0: not known. locks: the
    flags that new mappings get by mlockall(MCL_FUTURE). anons: numbers of anon_vmas given out."""

    def __init__(self, areas: list[Area] | None = None) -> None:
        self.areas = areas or []
        self.starts = [a.vma.start for a in self.areas]
        self.brk = 0
        self.locks: frozenset[str] = frozenset()
        self.anons = 0

    def copy(self) -> Space:
        """The same once more."""
        out = Space(list(self.areas))
        out.brk, out.locks, out.anons = self.brk, self.locks, self.anons
        return out

    def new_anon(self) -> int:
        """The number of a new anon_vma."""
        self.anons += 1
        return self.anons

    def index(self, addr: int) -> int:
        """Index of the area that holds `addr`, or -1."""
        i = bisect.bisect_right(self.starts, addr) - 1
        return i if i >= 0 and addr < self.areas[i].vma.end else -1

    def after(self, addr: int) -> int:
        """Index of the first area that ends above `addr`."""
        i = bisect.bisect_right(self.starts, addr) - 1
        return i if i >= 0 and addr < self.areas[i].vma.end else i + 1

    def place(self, start: int) -> int:
        """Index at which an area that starts there is inserted."""
        return bisect.bisect_left(self.starts, start)

    def set(self, low: int, high: int, areas: list[Area]) -> None:
        """Replace areas[low:high]."""
        self.areas[low:high] = areas
        self.starts[low:high] = [a.vma.start for a in areas]

    def cut(self, start: int, end: int) -> list[Area]:
        """Take [start, end) out; returns what was there, cut to it."""
        low, high = self.after(start), bisect.bisect_left(self.starts, end)
        out, left = [], []
        for area in self.areas[low:high]:
            v = area.vma
            if v.start < start:
                left.append(replace(area, vma=v.replaced(end=start)))
            if v.end > end:
                left.append(replace(area, vma=shifted(v, end)))
            inner = shifted(v, start) if v.start < start else v
            out.append(replace(area, vma=inner.replaced(end=min(v.end, end))))
        self.set(low, max(low, high), left)
        return out


def shifted(vma: Vma, start: int) -> Vma:
    """The vma from `start` on, its offset into the file or shared object moved along."""
    offset = vma.offset + start - vma.start if vma.inode or vma.shared else 0
    return vma.replaced(start=start, offset=offset)


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
        self._accounting = capture.table("accounting", ["snapshot", "vma", "Anonymous", "Swap"])
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

    def anonymous(self, snapshot: int) -> list[int]:
        """Indices of the vmas of a snapshot that hold, or held, private pages: they have an anon_vma."""
        import pyarrow.compute as pc

        table = self._accounting
        mine = table.filter(pc.equal(table.column("snapshot"), snapshot))
        own = sum(pc.fill_null(mine.column(name), 0).to_numpy() for name in ("Anonymous", "Swap"))
        vma = mine.column("vma").to_numpy()
        return sorted(vma[(own > 0) & (vma >= 0)].tolist())

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
