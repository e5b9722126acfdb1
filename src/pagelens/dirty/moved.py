"""Pages that lie in another frame than at the look before: what soft-dirty marks of them without a write, and what
it does not mark though their contents are others.

Page migration (compaction, NUMA balancing, move_pages(2), memory hotplug) puts the dirty bit back into the entry
that it restores, and on x86 that sets soft-dirty too (remove_migration_pte in mm/migrate.c: pte_mkdirty where the
folio is dirty; since 6.1, which remembers the bit in the migration entry; kernels from the end of 2025 on clear
soft-dirty again). A copy made by a write (after fork) has a frame of its own too, but such a folio is not dirty:
only its entry is. mremap marks each entry that it moves (move_soft_dirty_pte), but none where it moves a whole page
table (move_normal_pmd): frames that follow each other as they did elsewhere before have been moved so. (One page
alone may as well be a frame that was freed there and is used here.) KSM gives a page that was written before an
unmarked entry in the frame that it shares (replace_page in mm/ksm.c).

Rejected: /proc/vmstat's pgmigrate_success (it counts the whole machine, and after the fact).
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
    where = _joined(page)
    count = ((where.end - where.start) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return Frames(where, np.cumsum(count) - count, pfn)


def moved(before: Frames, now: Frames, marked: Spans, content: Spans, mergeable: Spans) -> Spans:
    """The pages that were moved to where they are, written or not. marked: soft-dirty, and in doubt; content: with
    private contents; mergeable: of vmas that KSM may merge. Raises CapabilityMissingError where
    /proc/kpageflags cannot be read."""
    page, was, here = _others(before, now)
    if not len(page):
        return spans.EMPTY
    held = spans.inside(page, content)
    in_doubt = spans.inside(page, marked)
    found = _from_elsewhere(before, page, here) & (held | in_doubt)
    found |= held & ~in_doubt & (was != 0) & spans.inside(page, mergeable)
    ask = np.flatnonzero(in_doubt & (was != 0) & ~found)
    if len(ask):
        flags, known = frames.lookup("kpageflags", here[ask])
        found[ask[known & ((flags & np.uint64(frames.DIRTY)) != 0)]] = True
    return _joined(page[found])


def _others(before: Frames, now: Frames) -> tuple[U64, U64, U64]:
    # (address, frame before, frame now) of the pages whose frame is known now and was not the same before.
    page = spans.pages(now.where)
    was = before.pfn if spans.same(before.where, now.where) else before.of(page)
    index = np.flatnonzero((was != now.pfn) & (now.pfn != 0))
    return page[index], was[index], now.pfn[index]


def _from_elsewhere(before: Frames, page: U64, frame: U64) -> npt.NDArray[np.bool_]:
    # Whether two pages or more, this one among them, lie in frames that lay side by side elsewhere.
    order = np.argsort(frame)
    ranked = frame[order]
    place = np.minimum(ranked.searchsorted(before.pfn), len(ranked) - 1)
    hit = np.flatnonzero(ranked[place] == before.pfn)
    by = np.zeros(len(page), np.uint64)  # how far the page was moved; 0: its frame was nowhere before
    by[order[place[hit]]] = page[order[place[hit]]] - spans.pages(before.where)[hit]
    out = np.zeros(len(page), bool)
    with_next = (by[1:] != 0) & (by[1:] == by[:-1]) & (page[1:] == page[:-1] + np.uint64(PAGE_SIZE))
    out[1:] |= with_next
    out[:-1] |= with_next
    return out


def _joined(page: U64) -> Spans:
    return spans.joined(page, page + np.uint64(PAGE_SIZE))
