"""PageRuns: the state of pages, as runs of equal state in columns.

Struct-of-arrays, so that a 1 TiB sparse space costs what it maps, and a query over millions of pages is a
numpy expression. Rejected: one object a page (slow), a bitmap a vma (a 1 TiB reservation costs 32 MiB a bit).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT

_Any = TypeVar("_Any", bound=np.generic)
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


class PageState(enum.IntFlag):
    """State bits of a page, from pagemap (fs/proc/task_mmu.c, pte_to_pagemap_entry) or PAGEMAP_SCAN."""

    NONE = 0
    PRESENT = 1 << 0  # pagemap bit 63
    SWAPPED = 1 << 1  # bit 62
    FILE = 1 << 2  # bit 61: file page or shared anonymous
    SOFT_DIRTY = 1 << 3  # bit 55; meaningful only where the kernel has soft-dirty
    EXCLUSIVE = 1 << 4  # bit 56: mapped once (PM_MMAP_EXCLUSIVE)
    UFFD_WP = 1 << 5  # bit 57
    GUARD = 1 << 6  # bit 58, Linux 6.15 and later
    ZERO = 1 << 7  # zero page: PAGE_IS_PFNZERO, or kpageflags KPF_ZERO_PAGE
    HUGE = 1 << 8  # PMD-mapped: PAGE_IS_HUGE
    WRITTEN = 1 << 9  # PAGE_IS_WRITTEN: written since armed with uffd-wp


@dataclass(frozen=True, slots=True)
class PageRuns:
    """Runs of pages of equal state.

    start: uint64[n], byte address of each run's first page, ascending, without overlap.
    count: uint64[n], pages in the run. state: uint32[n], PageState bits.
    Pages that are not listed are absent (no pte).
    pfn, mapcount, kflags: per page (not per run), length count.sum(), only where asked for; page i of run r
    is at `first[r] + i`. pfn uint64 (0 = unknown), mapcount int64 (-1 = unknown), kflags uint64.
    """

    start: U64
    count: U64
    state: U32
    pfn: U64 | None = None
    mapcount: I64 | None = None
    kflags: U64 | None = None
    first: I64 = field(init=False)

    def __post_init__(self) -> None:
        first = np.zeros(len(self.count), dtype=np.int64)
        if len(first) > 1:
            np.cumsum(self.count[:-1].astype(np.int64), out=first[1:])
        object.__setattr__(self, "first", first)

    @classmethod
    def empty(cls) -> PageRuns:
        """No pages."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint32))

    @classmethod
    def from_pages(
        cls,
        addr: U64,
        state: U32,
        *,
        pfn: U64 | None = None,
        mapcount: I64 | None = None,
        kflags: U64 | None = None,
    ) -> PageRuns:
        """From per-page columns, ascending by address; equal neighbours become one run."""
        if not len(addr):
            return cls.empty()
        step = np.uint64(1 << PAGE_SHIFT)
        breaks = np.flatnonzero((np.diff(addr) != step) | (np.diff(state) != 0)) + 1
        first = np.concatenate(([0], breaks))
        count = np.diff(np.concatenate((first, [len(addr)]))).astype(np.uint64)
        return cls(
            addr[first].astype(np.uint64), count, state[first].astype(np.uint32), pfn, mapcount, kflags
        )

    @property
    def pages(self) -> int:
        """Pages in all runs."""
        return int(self.count.sum())

    def addresses(self) -> U64:
        """uint64[pages]: the address of each page."""
        total = self.pages
        if not total:
            return np.empty(0, np.uint64)
        run = np.repeat(np.arange(len(self.count)), self.count.astype(np.int64))
        within = np.arange(total, dtype=np.int64) - self.first[run]
        return np.asarray(
            self.start[run] + (within.astype(np.uint64) << np.uint64(PAGE_SHIFT)), dtype=np.uint64
        )

    def states(self) -> U32:
        """uint32[pages]: the state of each page."""
        return np.repeat(self.state, self.count.astype(np.int64))

    def count_where(self, bits: PageState, without: PageState = PageState.NONE) -> int:
        """Pages that have all of `bits` and none of `without`."""
        want, not_want = np.uint32(bits), np.uint32(without)
        hit = ((self.state & want) == want) & ((self.state & not_want) == 0)
        return int(self.count[hit].sum())

    def where(self, bits: PageState, without: PageState = PageState.NONE) -> PageRuns:
        """The runs that have all of `bits` and none of `without`."""
        want, not_want = np.uint32(bits), np.uint32(without)
        return self._take(((self.state & want) == want) & ((self.state & not_want) == 0))

    def clipped(self, start: int, end: int) -> PageRuns:
        """Only the pages of [start, end); runs that cross an edge are cut."""
        shift = np.uint64(PAGE_SHIFT)
        ends = self.start + (self.count << shift)
        hit = (self.start < np.uint64(end)) & (ends > np.uint64(start))
        new_start = np.maximum(self.start[hit], np.uint64(start))
        new_end = np.minimum(ends[hit], np.uint64(end))
        count = (new_end - new_start) >> shift
        columns: dict[str, npt.NDArray[np.generic] | None] = {}
        skip = ((new_start - self.start[hit]) >> shift).astype(np.int64) + self.first[hit]
        picks = _spans(skip, count.astype(np.int64))
        for name in ("pfn", "mapcount", "kflags"):
            column = getattr(self, name)
            columns[name] = None if column is None else column[picks]
        return PageRuns(new_start, count, self.state[hit], **columns)  # type: ignore[arg-type]

    def _take(self, mask: npt.NDArray[np.bool_]) -> PageRuns:
        per_page = np.repeat(mask, self.count.astype(np.int64))
        return PageRuns(
            self.start[mask],
            self.count[mask],
            self.state[mask],
            None if self.pfn is None else self.pfn[per_page],
            None if self.mapcount is None else self.mapcount[per_page],
            None if self.kflags is None else self.kflags[per_page],
        )

    def ranges(self) -> list[tuple[int, int]]:
        """[(start, pages)], neighbours joined whatever their state: for printing and for system calls."""
        out: list[tuple[int, int]] = []
        for start, count in zip(self.start.tolist(), self.count.tolist(), strict=True):
            if out and out[-1][0] + (out[-1][1] << PAGE_SHIFT) == start:
                out[-1] = (out[-1][0], out[-1][1] + count)
            else:
                out.append((start, count))
        return out

    def __len__(self) -> int:
        return len(self.start)

    def __iter__(self) -> Iterator[tuple[int, int, PageState]]:
        for start, count, state in zip(
            self.start.tolist(), self.count.tolist(), self.state.tolist(), strict=True
        ):
            yield start, count, PageState(state)


def _spans(first: I64, count: I64) -> I64:
    # Indices [first, first+count) of every run, joined.
    if not len(first):
        return np.empty(0, np.int64)
    base = np.repeat(first - np.concatenate(([0], np.cumsum(count)[:-1])), count)
    return base + np.arange(int(count.sum()), dtype=np.int64)


def distinct(values: npt.NDArray[_Any]) -> npt.NDArray[_Any]:
    """The distinct values, ascending. As np.unique, but by sorting: its hash table (numpy 2.3 and later) takes
    80 times as long for a million page addresses, whose low bits are all alike."""
    if not len(values):
        return values[:0]
    ordered = np.sort(values)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))]


def contained(values: npt.NDArray[_Any], ascending: npt.NDArray[_Any]) -> npt.NDArray[np.bool_]:
    """Which values are among `ascending` (sorted). As np.isin, without its np.unique of both (see `distinct`)."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[at] == values
    return found
