"""Page tables: the state of every page of an address space, and which table pages exist.

The leaf entries stand in chunks of 32,768 pages (64 PTE tables, 128 MiB), one uint64 a page (bits in `abi`),
with the id of the event that last changed the page beside it. The kernel's table pages (PTE, PMD, PUD) are
kept as sets of their numbers, because VmPTE counts them and munmap frees them by rules of its own
(free_pgtables). A chunk is allocated zeroed, so that a sparse space costs what is touched. Rejected: an array
a vma (split, merge and mremap would copy), 512-entry arrays (numpy's cost a call would dominate).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pagelens.model.abi import FRAME_SHIFT, SHIFT, ZERO, P
from pagelens.vm.pages import U64

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
CHUNK_SHIFT = 27
CHUNK_PAGES = 1 << (CHUNK_SHIFT - SHIFT)
_LOW = CHUNK_PAGES - 1


class Chunk:
    """pte: uint64[32768]; event: int32[32768], allocated with the chunk but backed only where touched."""

    __slots__ = ("event", "pte")

    def __init__(self) -> None:
        self.pte: U64 = np.zeros(CHUNK_PAGES, np.uint64)
        self.event: I32 = np.zeros(CHUNK_PAGES, np.int32)


class PageTables:
    """PTEs by page number (addr >> 12)."""

    def __init__(self, levels: int = 4) -> None:
        self.levels = levels
        self.chunks: dict[int, Chunk] = {}
        self.pte_tables: set[int] = set()  # addr >> 21
        self.pmd_tables: set[int] = set()  # addr >> 30
        self.pud_tables: set[int] = set()  # addr >> 39
        self.p4d_tables: set[int] = set()  # addr >> 48, five levels only
        self.flushes: list[tuple[int, int, str]] = []  # TLB flushes owed: (start, end, why)

    @property
    def bytes(self) -> int:
        """mm_pgtables_bytes: PTE, PMD and PUD tables (p4d and pgd are not counted)."""
        return (len(self.pte_tables) + len(self.pmd_tables) + len(self.pud_tables)) << SHIFT

    def get(self, page: int) -> int:
        """The PTE of a page number; 0 if there is none."""
        chunk = self.chunks.get(page >> 15)
        return int(chunk.pte[page & _LOW]) if chunk is not None else 0

    def put(self, page: int, pte: int, event: int) -> None:
        """Set a PTE; its tables must exist (see `ensure`)."""
        chunk = self.chunks.get(page >> 15)
        if chunk is None:
            chunk = self.chunks[page >> 15] = Chunk()
        chunk.pte[page & _LOW] = pte
        chunk.event[page & _LOW] = event

    def event_of(self, page: int) -> int:
        """Event that last changed the page; 0 if none did."""
        chunk = self.chunks.get(page >> 15)
        return int(chunk.event[page & _LOW]) if chunk is not None else 0

    def chunk(self, number: int) -> Chunk:
        """The chunk, made if need be."""
        found = self.chunks.get(number)
        if found is None:
            found = self.chunks[number] = Chunk()
        return found

    def ensure(self, page: int) -> None:
        """__pte_alloc and the levels above it, for one page."""
        table = page >> 9
        if table not in self.pte_tables:
            self.pte_tables.add(table)
            self.pmd_tables.add(page >> 18)
            self.pud_tables.add(page >> 27)
            if self.levels == 5:
                self.p4d_tables.add(page >> 36)

    def ensure_upper(self, page: int) -> None:
        """The levels above the PTE table (__handle_mm_fault), for one page."""
        self.pmd_tables.add(page >> 18)
        self.pud_tables.add(page >> 27)
        if self.levels == 5:
            self.p4d_tables.add(page >> 36)

    def ensure_range(self, first: int, last: int) -> None:
        """The tables of pages [first, last)."""
        if first >= last:
            return
        self.pte_tables.update(range(first >> 9, ((last - 1) >> 9) + 1))
        self.pmd_tables.update(range(first >> 18, ((last - 1) >> 18) + 1))
        self.pud_tables.update(range(first >> 27, ((last - 1) >> 27) + 1))
        if self.levels == 5:
            self.p4d_tables.update(range(first >> 36, ((last - 1) >> 36) + 1))

    def spans(self, first: int, last: int, *, create: bool = False) -> Iterator[tuple[int, Chunk, slice]]:
        """(first page, chunk, slice in it) of the chunks that cover pages [first, last); without create only
        those that exist."""
        lo, hi = first >> 15, ((last - 1) >> 15) + 1
        if not create and hi - lo > len(self.chunks):
            numbers: list[int] | range = sorted(n for n in self.chunks if lo <= n < hi)
        else:
            numbers = range(lo, hi)
        for number in numbers:
            chunk = self.chunk(number) if create else self.chunks.get(number)
            if chunk is None:
                continue
            base = number << 15
            start, stop = max(first, base), min(last, base + CHUNK_PAGES)
            if start < stop:
                yield start, chunk, slice(start - base, stop - base)

    def free_tables(self, start: int, end: int, floor: int, ceiling: int) -> None:
        """free_pgd_range: tables of [start, end) that no neighbour between floor and ceiling needs.

        floor: end of the area below (0: none). ceiling: start of the area above, or the top of user space.
        """
        for tables, shift in (
            (self.pte_tables, 21), (self.pmd_tables, 30), (self.pud_tables, 39), (self.p4d_tables, 48),
        ):  # fmt: skip
            if not tables:
                continue
            size = 1 << shift
            lo = start >> shift
            if (lo << shift) < floor:
                lo = (floor + size - 1) >> shift
            hi = (end + size - 1) >> shift
            if (hi << shift) > ceiling:
                hi = ceiling >> shift
            if hi - lo > len(tables):
                tables.difference_update([t for t in tables if lo <= t < hi])
            elif hi > lo:
                tables.difference_update(range(lo, hi))

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(first page, pages, first entry) of pages [first, last) that have an entry: pages of one table whose entries
        are alike and whose frames follow each other (or are the zero page)."""
        for start, chunk, where in self.spans(first, last):
            entries = chunk.pte[where]
            index = entries.nonzero()[0]
            if not len(index):
                continue
            page, entry = index + start, entries[index]
            step = np.where(entry[:-1] & np.uint64(ZERO | P) == P, np.uint64(1 << FRAME_SHIFT), np.uint64(0))
            apart = (np.diff(index) != 1) | (page[1:] & 511 == 0) | (entry[1:] != entry[:-1] + step)
            at = np.concatenate(([0], apart.nonzero()[0] + 1, [len(index)]))
            for i, j in pairwise(at.tolist()):
                yield int(page[i]), j - i, int(entry[i])

    def walk(self, addr: int) -> list[tuple[str, int, bool]]:
        """The walk of one address, top first: (level, index in that table, entry present)."""
        page = addr >> SHIFT
        steps: list[tuple[str, int, bool]] = []
        if self.levels == 5:
            steps.append(("pgd", (page >> 36) & 511, (page >> 36) in self.p4d_tables))
        steps += [
            ("p4d" if self.levels == 5 else "pgd", (page >> 27) & 511, (page >> 27) in self.pud_tables),
            ("pud", (page >> 18) & 511, (page >> 18) in self.pmd_tables),
            ("pmd", (page >> 9) & 511, (page >> 9) in self.pte_tables),
            ("pte", page & 511, bool(self.get(page) & 1)),
        ]
        for i, step in enumerate(steps):
            if not step[2]:
                return steps[: i + 1]
        return steps

    def flush(self, start: int, end: int, why: str) -> None:
        """Note a TLB flush owed; the last 64 are kept."""
        self.flushes.append((start, end, why))
        if len(self.flushes) > 64:
            del self.flushes[:32]
