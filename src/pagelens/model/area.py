"""Vm areas (vm_area_struct), their anon_vma chains, and the sorted container that finds them.

`Area` is mutable, unlike `vm.Vma`, which is what leaves the model. The anon_vma chain decides whether areas
merge (rmap.c, anon_vma_clone, anon_vma_fork), so it is modelled with its counts. The container keeps blocks
of areas, each with its widest gap, so that neither look-up nor placement is linear in 65,000 areas. Rejected:
one flat list (placement becomes quadratic), a maple tree (the same answers, more code).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from pagelens.model.abi import SHIFT, VM_ACCESS, VM_DROPPABLE, VM_GROWSDOWN
from pagelens.model.files import File
from pagelens.model.frames import F_ANON, F_LAZY
from pagelens.vm.vma import Vma

STACK_GUARD_GAP = 256 << SHIFT


class AnonVma:
    """struct anon_vma: parent and the two counts that decide reuse."""

    __slots__ = ("active", "children", "parent", "users")

    def __init__(self, parent: AnonVma | None = None) -> None:
        self.parent = parent if parent is not None else self
        self.children = 1 if parent is None else 0  # the root is its own parent
        self.active = 0
        self.users = 0  # areas in its interval tree


class Area:
    """One vm_area_struct. pgoff in pages; event: id of the event that put it into its present state."""

    __slots__ = (
        "anon_vma", "born", "chain", "end", "event", "file", "flags", "name", "pgoff", "shown", "start",
    )  # fmt: skip

    def __init__(
        self,
        start: int,
        end: int,
        flags: int,
        pgoff: int,
        file: File | None = None,
        name: str = "",
        event: int = 0,
    ) -> None:
        self.start = start
        self.end = end
        self.flags = flags
        self.pgoff = pgoff
        self.file = file
        self.name = name  # only for special and anonymous areas that have one; never decides a merge
        self.anon_vma: AnonVma | None = None
        self.chain: list[AnonVma] = []
        self.event = event
        self.born = event
        self.shown: tuple[object, Vma] | None = None  # its last record (export), and what it was made of

    @property
    def pages(self) -> int:
        return (self.end - self.start) >> SHIFT

    @property
    def is_anon(self) -> bool:
        """vma_is_anonymous: no vm_ops."""
        return self.file is None and not self.name.startswith("[v")

    @property
    def accessible(self) -> bool:
        return bool(self.flags & VM_ACCESS)

    @property
    def start_gap(self) -> int:
        """vm_start_gap: the guard gap below a stack counts as its own."""
        if self.flags & VM_GROWSDOWN:
            return max(0, self.start - STACK_GUARD_GAP)
        return self.start

    @property
    def frame_flags(self) -> int:
        """Of a new anonymous frame (folio_add_new_anon_rmap): those of MAP_DROPPABLE are not swap-backed."""
        return F_ANON | F_LAZY if self.flags & VM_DROPPABLE else F_ANON

    @property
    def close_hook(self) -> bool:
        """vm_ops->close exists."""
        return self.file is not None and self.file.close_hook

    def copy(self, event: int) -> Area:
        """vm_area_dup, without the anon_vma chain."""
        new = Area(self.start, self.end, self.flags, self.pgoff, self.file, self.name, event)
        new.born = self.born
        return new

    def pgoff_at(self, addr: int) -> int:
        """Page offset (vm_pgoff) of an address."""
        return self.pgoff + ((addr - self.start) >> SHIFT)

    def __repr__(self) -> str:
        return f"Area({self.start:#x}-{self.end:#x} flags={self.flags:#x})"


def attach(area: Area, anon: AnonVma) -> None:
    """anon_vma_chain_link."""
    area.chain.insert(0, anon)
    anon.users += 1


def clone_chain(dst: Area, src: Area) -> None:
    """anon_vma_clone: dst joins all of src's anon_vmas; an idle one is reused as dst's own (rmap.c)."""
    fork = dst.anon_vma is None
    chain = []
    for anon in src.chain:
        chain.append(anon)
        anon.users += 1
    dst.chain = chain
    if fork:
        for anon in reversed(chain):
            if dst.anon_vma is None and src.anon_vma is not None and anon.children < 2 and anon.active == 0:
                dst.anon_vma = anon
    if dst.anon_vma is not None:
        dst.anon_vma.active += 1


def fork_chain(dst: Area, src: Area) -> None:
    """anon_vma_fork."""
    if src.anon_vma is None:
        return
    dst.anon_vma = None
    clone_chain(dst, src)
    if dst.anon_vma is not None:
        return
    own = AnonVma(src.anon_vma)
    own.active = 1
    dst.anon_vma = own
    attach(dst, own)
    src.anon_vma.children += 1


def unlink_chain(area: Area) -> None:
    """unlink_anon_vmas."""
    for anon in area.chain:
        anon.users -= 1
        if anon.users == 0:
            anon.parent.children -= 1
    area.chain = []
    if area.anon_vma is not None:
        area.anon_vma.active -= 1
        area.anon_vma = None


_BLOCK = 256


class AreaTree:
    """Areas sorted by address, without overlap."""

    def __init__(self) -> None:
        self._blocks: list[list[Area]] = []
        self._ends: list[int] = []  # end of each block's last area
        self._gaps: list[int | None] = []  # widest gap below an area of the block, None: recompute
        self.count = 0
        # What the last search from the top learnt: between top and high no gap is length bytes wide.
        self._searched: tuple[int, int, int] | None = None  # (high, length, top)

    def _locate(self, addr: int) -> tuple[int, int]:
        # Position of the first area whose end is above addr.
        block = bisect_right(self._ends, addr)
        if block == len(self._blocks):
            return block, 0
        areas = self._blocks[block]
        low, high = 0, len(areas)
        while low < high:
            mid = (low + high) >> 1
            if areas[mid].end > addr:
                high = mid
            else:
                low = mid + 1
        return block, low

    def find(self, addr: int) -> Area | None:
        """find_vma: the first area whose end is above addr."""
        block, index = self._locate(addr)
        return self._blocks[block][index] if block < len(self._blocks) else None

    def at(self, addr: int) -> Area | None:
        """The area that holds addr (vma_lookup)."""
        area = self.find(addr)
        return area if area is not None and area.start <= addr else None

    def prev(self, addr: int) -> Area | None:
        """The last area whose end is at or below addr's area or gap: the one before find(addr)."""
        block, index = self._locate(addr)
        if index:
            return self._blocks[block][index - 1]
        return self._blocks[block - 1][-1] if block else None

    def neighbours(self, addr: int) -> tuple[Area | None, Area | None]:
        """(the area before find(addr), find(addr))."""
        block, index = self._locate(addr)
        here = self._blocks[block][index] if block < len(self._blocks) else None
        if index:
            return self._blocks[block][index - 1], here
        return (self._blocks[block - 1][-1] if block else None), here

    def next(self, area: Area) -> Area | None:
        """The area after this one."""
        return self.find(area.end)

    def overlapping(self, start: int, end: int) -> list[Area]:
        """All areas that share a byte with [start, end)."""
        out: list[Area] = []
        block, index = self._locate(start)
        while block < len(self._blocks):
            areas = self._blocks[block]
            for area in areas[index:]:
                if area.start >= end:
                    return out
                out.append(area)
            block, index = block + 1, 0
        return out

    def insert(self, area: Area) -> None:
        """Add an area; the caller has made room."""
        self.count += 1
        if area.file is not None:
            area.file.users += 1
        block, index = self._locate(area.start)
        if block == len(self._blocks):
            if not block or len(self._blocks[-1]) >= _BLOCK:
                self._blocks.append([area])
                self._ends.append(area.end)
                self._gaps.append(None)
                return
            block -= 1
            index = len(self._blocks[block])
        areas = self._blocks[block]
        areas.insert(index, area)
        if len(areas) > 2 * _BLOCK:
            self._blocks[block : block + 1] = [areas[:_BLOCK], areas[_BLOCK:]]
            self._ends[block : block + 1] = [areas[_BLOCK - 1].end, areas[-1].end]
            self._gaps[block : block + 1] = [None, None]
        self._dirty(block)

    def remove(self, area: Area) -> None:
        """Take an area out."""
        block, index = self._locate(area.start)
        areas = self._blocks[block]
        if areas[index] is not area:
            raise AssertionError("area is not in the tree")
        self.count -= 1
        if area.file is not None:
            area.file.users -= 1
            area.file.unused()
        del areas[index]
        if self._searched is not None and area.end > self._searched[2]:
            above = self.find(area.end) if index == len(areas) else areas[index]
            high, length, _ = self._searched
            self._searched = (high, length, above.start) if above is not None and above.start < high else None
        if areas:
            self._dirty(block)
        else:
            del self._blocks[block], self._ends[block], self._gaps[block]
            if block < len(self._gaps):
                self._gaps[block] = None

    def resize(self, area: Area, start: int, end: int, pgoff: int) -> None:
        """Move an area's edges. Its place in the order stays; the caller has made room."""
        block, _ = self._locate(area.start)
        shrinks = start > area.start or end < area.end
        if shrinks and self._searched is not None and area.end > self._searched[2]:
            self._searched = None
        area.start, area.end, area.pgoff = start, end, pgoff
        self._dirty(block)

    def _dirty(self, block: int) -> None:
        self._ends[block] = self._blocks[block][-1].end
        self._gaps[block] = None
        if block + 1 < len(self._gaps):
            self._gaps[block + 1] = None

    def _gap(self, block: int) -> int:
        gap = self._gaps[block]
        if gap is None:
            last = self._ends[block - 1] if block else 0
            gap = 0
            for area in self._blocks[block]:
                gap = max(gap, area.start - last)
                last = area.end
            self._gaps[block] = gap
        return gap

    def highest_gap(self, low: int, high: int, length: int) -> tuple[int, Area | None] | None:
        """(end of the highest gap in [low, high) of at least length bytes, the area above it), or None."""
        known = self._searched
        if known is not None and known[0] == high and known[1] <= length and known[2] > low:
            block, index = self._locate(known[2])
        else:
            block, index = self._locate(high - 1)
        above = self._blocks[block][index] if block < len(self._blocks) else None
        top = min(high, above.start) if above is not None else high
        steps = 0  # near neighbours are cheaper to look at than a block is to measure anew
        while True:
            if index:
                index -= 1
            else:
                block -= 1
                index = len(self._blocks[block]) - 1 if block >= 0 else 0
            area = self._blocks[block][index] if block >= 0 else None
            if top - max(area.end if area else 0, low) >= length:
                self._searched = (high, length, top) if above is not None and top < high else None
                return top, above
            if area is None or area.start <= low:
                return None
            steps += 1
            if steps > 8 and self._gap(block) < length:
                index = 0  # no gap of this block is wide enough: go on below its first area
                area = self._blocks[block][0]
            top, above = area.start, area

    def lowest_gap(self, low: int, high: int, length: int) -> tuple[int, Area | None] | None:
        """(start of the lowest gap in [low, high) of at least length bytes, the area above it), or None."""
        bottom = low
        for area in self:
            if area.end <= bottom:
                continue
            if min(area.start, high) - bottom >= length:
                return bottom, area
            bottom = area.end
            if bottom >= high:
                return None
        return (bottom, None) if high - bottom >= length else None

    def states(self) -> list[tuple[Area, int, int, int, int]]:
        """What of each area can change that maps shows: (area, start, end, flags, pgoff)."""
        return [(a, a.start, a.end, a.flags, a.pgoff) for areas in self._blocks for a in areas]

    def __iter__(self) -> Iterator[Area]:
        for areas in list(self._blocks):
            yield from list(areas)

    def __len__(self) -> int:
        return self.count
