"""Which vmas are watched, by kind: shared by the backends.

The maps text is read at each look and parsed only where it changed (a comparison of bytes costs nothing beside
a parse). Three kinds matter, because a page that goes away means something else in each: private anonymous
(it reads as zeros), private of a file (it reads as the file again), shared (its contents live on elsewhere).

The latter two have contents without page-table entries, so that nothing in the entries tells when another mapping
takes their place: the two lists of vmas do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagelens.dirty import spans
from pagelens.dirty.spans import Spans
from pagelens.linux import maps
from pagelens.linux.procfs import Process
from pagelens.linux.settings import user_space_end
from pagelens.vm.vma import Prot, Vma, VmaList

ANON, FILE, SHARED = 1, 2, 3
KINDS = (ANON, FILE, SHARED)
LOW = 0x10000  # below vm.mmap_min_addr nothing is mapped
_NEVER = frozenset(("[vdso]", "[vsyscall]"))


def kind_of(vma: Vma) -> int:
    """ANON, FILE (private mapping of a file) or SHARED for a vma that is to be watched; 0 for the others:
    what cannot be written now. (A private anonymous vma that is not writable may become so without a new vma;
    glibc's and the JVM's heaps do that all the time.)"""
    if vma.name in _NEVER or vma.name.startswith("[vvar"):
        return 0
    if vma.shared:
        return SHARED if vma.prot & Prot.WRITE else 0
    if vma.inode == 0:
        return ANON
    return FILE if vma.prot & Prot.WRITE else 0


class Layout:
    """The watched part of an address space. `kinds`: spans by kind; `watched`: all of them; `vmas`: the maps;
    `walk`: the address space without the vmas that are not watched (few long spans: holes cost nothing);
    `replaced`: where a watched mapping of a file or of shared memory gave way to one of something else, since it
    was last emptied.

    ranges: only these bytes; None: all. limit: shared mappings larger than this (bytes) are in `large`.
    """

    def __init__(self, proc: Process, ranges: Spans | None, limit: int) -> None:
        self._proc = proc
        self._ranges = ranges
        self._limit = limit
        self._raw = b""
        self._lines: dict[bytes, Vma] = {}
        self.vmas = VmaList()
        self.kinds: dict[int, Spans] = dict.fromkeys(KINDS, spans.EMPTY)
        self.large = spans.EMPTY
        self.watched = spans.EMPTY
        self.walk = spans.EMPTY
        self.replaced = spans.EMPTY

    @property
    def is_read(self) -> bool:
        """Whether it has been read at all."""
        return bool(self._raw)

    def read(self, was_watched: Spans) -> bool:
        """Read the maps; returns whether anything changed. A mapping that was writable and watched
        (`was_watched`) and is read-only now is still watched: what was written to it is still to be told."""
        raw = self._proc.read("maps")
        if raw == self._raw:
            return False
        self._raw = raw
        before, self.vmas = self.vmas, self._parsed(raw)
        backed = spans.union(self.kinds[FILE], self.kinds[SHARED])
        if backed:
            self.replaced = spans.union(self.replaced, spans.common(_replaced(before, self.vmas), backed))
        pairs: dict[int, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
        read_only: dict[int, list[tuple[int, int]]] = {FILE: [], SHARED: []}
        large = []
        for vma in self.vmas:
            if kind := kind_of(vma):
                pairs[kind].append((vma.start, vma.end))
                if kind == SHARED and vma.size > self._limit:
                    large.append((vma.start, vma.end))
            elif vma.inode and not vma.name.startswith("["):
                read_only[SHARED if vma.shared else FILE].append((vma.start, vma.end))
        everything = spans.EMPTY
        for kind in KINDS:
            where = spans.of(pairs[kind])
            if kind in read_only:
                where = spans.union(where, spans.common(spans.of(read_only[kind]), was_watched))
            if self._ranges is not None:
                where = spans.common(where, self._ranges)
            self.kinds[kind] = where
            everything = spans.union(everything, where)
        self.large = spans.of(large)
        self.watched = everything
        self.walk = spans.minus(
            spans.of([(LOW, user_space_end())]),
            spans.minus(Spans(self.vmas.starts, self.vmas.ends), everything),
        )
        return True

    def _parsed(self, raw: bytes) -> VmaList:
        # Most lines are those of the look before, and a line says all of its vma.
        known, self._lines = self._lines, {}
        for line in raw.splitlines():
            self._lines[line] = known.get(line) or maps.parse_line(line)
        return VmaList(vma for vma in self._lines.values() if vma.start < maps.GATE)

    def leave_out(self, where: Spans) -> None:
        """Watch no longer what cannot be watched."""
        for kind, kept in self.kinds.items():
            self.kinds[kind] = spans.minus(kept, where)
        self.watched = spans.minus(self.watched, where)

    def take_replaced(self) -> Spans:
        """`replaced`, and empty it."""
        out, self.replaced = self.replaced, spans.EMPTY
        return out

    def whole_vmas(self, where: Spans) -> Spans:
        """The watched vmas that share a page with `where`, whole."""
        if not where:
            return where
        mapped = Spans(self.vmas.starts, self.vmas.ends)
        hit: list[int] = sorted(set(spans.overlaps(where, mapped)[2].tolist()))
        return spans.common(spans.joined(mapped.start[hit], mapped.end[hit]), self.watched)


def _replaced(before: VmaList, after: VmaList) -> Spans:
    # What was mapped from a file or shared memory and is mapped from another one, another part of it, or none.
    part, old, new = spans.overlaps(Spans(before.starts, before.ends), Spans(after.starts, after.ends))
    was, now = _backing(before), _backing(after)
    changed = np.flatnonzero((was[old] != now[new]).any(axis=1) & (was[old, 0] != 0))
    return spans.joined(part.start[changed], part.end[changed])


def _backing(vmas: VmaList) -> npt.NDArray[np.int64]:
    # (inode, device, offset at address 0) of each vma: the same along a mapping, however it is split.
    rows = [(v.inode, hash(v.dev), v.offset - v.start) if v.inode else (0, 0, 0) for v in vmas]
    return np.array(rows, np.int64).reshape(-1, 3)
