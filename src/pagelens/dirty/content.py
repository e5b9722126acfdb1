"""`--content`: which listed pages really have other bytes than at the last look.

Keeps one 64-bit hash for each page that has been seen. The target runs on while pages are read, so the
comparison is between what was read then and what is read now; a write after the read is listed by the next
look in any case. Rejected: keeping copies (doubles the target's memory).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagelens.dirty import spans
from pagelens.dirty.epoch import Epoch
from pagelens.dirty.spans import Spans
from pagelens.linux import memory
from pagelens.vm.pages import contained


class Contents:
    """Hashes of the pages of one process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._addr: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._hash: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    def remember(self, where: Spans) -> None:
        """Hash the pages of `where` as they are now."""
        pages = spans.pages(where)
        hashes, readable = memory.hash_pages(self._pid, where.pairs())
        self._merge(pages[readable], hashes[readable])

    def unchanged(self, epoch: Epoch) -> int:
        """How many of the epoch's pages hold the same bytes as when they were last read; remembers the new
        ones. Pages never read before count as changed."""
        where = epoch.spans
        pages = spans.pages(where)
        hashes, readable = memory.hash_pages(self._pid, where.pairs())
        pages, hashes = pages[readable], hashes[readable]
        same = 0
        if len(self._addr) and len(pages):
            at = np.minimum(np.searchsorted(self._addr, pages), len(self._addr) - 1)
            same = int(((self._addr[at] == pages) & (self._hash[at] == hashes)).sum())
        self._merge(pages, hashes)
        return same

    def _merge(self, pages: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> None:
        keep = ~contained(self._addr, pages)
        addr = np.concatenate((self._addr[keep], pages))
        order = np.argsort(addr, kind="stable")
        self._addr = addr[order]
        self._hash = np.concatenate((self._hash[keep], hashes))[order]
