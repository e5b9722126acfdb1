"""Scans of a watched address space: what is populated, and what was written, read and protected again in one step."""

from __future__ import annotations

import numpy as np

from pagelens.dirty import spans
from pagelens.dirty.spans import Spans
from pagelens.linux import pagescan
from pagelens.linux.pagescan import Category, Regions, ScanFlag

_POPULATED = Category.PRESENT | Category.SWAPPED
_RETURN = (
    Category.WPALLOWED | Category.WRITTEN | _POPULATED | Category.PFNZERO | Category.HUGE
)  # fmt: skip
_MOST = 1 << 15  # regions a call: 768 KiB


class Scanner:
    """Scans by PAGEMAP_SCAN, in as few calls as the answers allow. keep_huge: huge pages are not protected again."""

    def __init__(self, *, keep_huge: bool) -> None:
        self.fd = -1  # pagemap
        self._keep_huge = keep_huge
        # MADV_GUARD_INSTALL's markers look like swap, and are no contents.
        self._guard = pagescan.supported() & Category.GUARD
        self._room = 256  # regions asked for in one call; grows with what is found

    def scan(
        self,
        where: Spans,
        *,
        mask: Category = Category.NONE,
        inverted: Category = Category.NONE,
        anyof: Category = _POPULATED,
        ret: Category = _RETURN,
        flags: ScanFlag = ScanFlag.NONE,
    ) -> Regions:
        """The regions of `where` that match (`linux.pagescan`)."""
        found = pagescan.scan(
            self.fd,
            where.pairs(),
            flags=flags,
            mask=mask | self._guard,
            inverted=inverted | self._guard,
            anyof=anyof,
            ret=ret,
            vec_len=self._room,
        )
        if len(found) > self._room // 2:
            self._room = min(_MOST, 2 * len(found))
        return found

    def collect(self, where: Spans, of_file: Spans) -> Regions:
        """What is populated in `where`, got and protected in one step. of_file: where private file mappings are."""
        # FILE is asked for only where it matters: for it the kernel looks at
        # each page's struct page (vm_normal_page), which costs ten times the walk.
        if not of_file:
            return self._collect_kind(where, _RETURN)
        other = self._collect_kind(spans.minus(where, of_file), _RETURN)
        mine = self._collect_kind(spans.common(where, of_file), _RETURN | Category.FILE)
        start = np.concatenate((other.start, mine.start))
        order = np.argsort(start, kind="stable")
        end, categories = (
            np.concatenate((other.end, mine.end)),
            np.concatenate((other.categories, mine.categories)),
        )
        return Regions(start[order], end[order], categories[order])

    def _collect_kind(self, where: Spans, ret: Category) -> Regions:
        if not self._keep_huge:
            return self.scan(where, flags=ScanFlag.WP_MATCHING, ret=ret)
        small = self.scan(
            where, mask=Category.HUGE, inverted=Category.HUGE, flags=ScanFlag.WP_MATCHING, ret=ret
        )
        huge = self.scan(where, mask=Category.HUGE, ret=ret)
        start = np.concatenate((small.start, huge.start))
        order = np.argsort(start, kind="stable")
        categories = np.concatenate((small.categories, huge.categories & ~np.uint64(Category.WRITTEN)))
        return Regions(start[order], np.concatenate((small.end, huge.end))[order], categories[order])
