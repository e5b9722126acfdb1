"""Pages that the kernel moved to another frame: soft-dirty marks them, though nobody wrote.

Page migration (compaction, NUMA balancing, move_pages(2), memory hotplug) puts the dirty bit back into the entry
that it restores, and on x86 that sets soft-dirty too (remove_migration_pte in mm/migrate.c: pte_mkdirty where the
folio is dirty; since 6.1, which remembers the bit in the migration entry; kernels from the end of 2025 on clear
soft-dirty again). So a page that is marked is not known to be written where (1) its frame is another one than at
the look before and (2) the folio is dirty, without which migration does not mark. A copy made by a write (after
fork) has a frame of its own too, but such a folio is not dirty: only its entry is.

Rejected: /proc/vmstat's pgmigrate_success alone (it counts the whole machine, and after the fact).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagelens.dirty import spans
from pagelens.dirty.spans import U64, Spans
from pagelens.linux import frames
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE


class Frames(NamedTuple):
    """The frame of each page of `where`: pfn uint64, all spans one after another; 0: not present, or hidden.
    first: where each span begins in it."""

    where: Spans
    first: npt.NDArray[np.int64]
    pfn: U64

    def of(self, page: U64) -> U64:
        """The frames of the pages at these addresses; 0 where not known."""
        out = np.zeros(len(page), np.uint64)
        if not self.where:
            return out
        index = np.searchsorted(self.where.end, page, side="right")
        index[index == len(self.where.end)] = 0
        inside = np.flatnonzero((page >= self.where.start[index]) & (page < self.where.end[index]))
        run = index[inside]
        within = (page[inside] - self.where.start[run]) >> np.uint64(PAGE_SHIFT)
        out[inside] = self.pfn[self.first[run] + within.astype(np.int64)]
        return out


NONE = Frames(spans.EMPTY, np.empty(0, np.int64), np.empty(0, np.uint64))


def read(pagemap_fd: int, where: Spans) -> Frames:
    """The frames of `where` now (8 bytes a page are read). All 0 without CAP_SYS_ADMIN."""
    if not where:
        return NONE
    count = ((where.end - where.start) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return Frames(where, np.cumsum(count) - count, frames.of_pages(pagemap_fd, where.start, where.end))


def from_pages(page: U64, pfn: U64) -> Frames:
    """From the addresses of pages, ascending, and their frames."""
    where = spans.joined(page, page + np.uint64(PAGE_SIZE))
    count = ((where.end - where.start) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return Frames(where, np.cumsum(count) - count, pfn)


def moved(before: Frames, now: Frames, marked: Spans) -> Spans:
    """The pages of `marked` that lie in another, dirty frame than before. Raises CapabilityMissingError where
    /proc/kpageflags cannot be read."""
    page = spans.pages(marked)
    was, here = before.of(page), now.of(page)
    other = np.flatnonzero((was != 0) & (here != 0) & (was != here))
    if not len(other):
        return spans.EMPTY
    flags, known = frames.lookup("kpageflags", here[other])
    found = page[other][known & ((flags & np.uint64(frames.DIRTY)) != 0)]
    return spans.joined(found, found + np.uint64(PAGE_SIZE))
