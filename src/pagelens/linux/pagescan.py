"""PAGEMAP_SCAN, typed (fs/proc/task_mmu.c, do_pagemap_scan; Linux 6.7 and later; ioctl_pagemap_scan(2)).

One ioctl walks the page tables of a whole address space, skips holes by the page-table page, and answers with
ranges of equal categories; with WP_MATCHING it write-protects what it reports in the same walk, atomically
per page. The header may be older than the kernel (Debian 12 has none), so the layout is written down here.

What it does not know: EXCLUSIVE and the frame number (pagemap has them), and the difference between a swap
entry and a pte marker (both are SWAPPED).
"""

from __future__ import annotations

import enum
import errno
import fcntl
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError

PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)

# size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
# category_anyof_mask, return_mask
_ARG = struct.Struct("12Q")
_WALK_END = 4
_REGION = np.dtype([("start", np.uint64), ("end", np.uint64), ("categories", np.uint64)])


class Category(enum.IntFlag):
    """PAGE_IS_* of include/uapi/linux/fs.h."""

    NONE = 0
    WPALLOWED = 1 << 0  # in a vma registered for asynchronous write protection
    WRITTEN = 1 << 1  # not write-protected by uffd-wp
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4  # swap entry, migration entry or pte marker
    PFNZERO = 1 << 5
    HUGE = 1 << 6  # mapped by a PMD (THP or hugetlb)
    SOFT_DIRTY = 1 << 7  # Linux 6.8; EINVAL before
    GUARD = 1 << 8  # Linux 6.15; EINVAL before


class ScanFlag(enum.IntFlag):
    """PM_SCAN_*: what to do besides reporting."""

    NONE = 0
    WP_MATCHING = 1 << 0  # write-protect the pages that match
    CHECK_WPASYNC = 1 << 1  # fail with EPERM where a vma is not registered for WP_ASYNC


@dataclass(frozen=True, slots=True)
class Regions:
    """Ranges of equal categories. start, end: uint64[n], bytes; categories: uint64[n], Category bits."""

    start: npt.NDArray[np.uint64]
    end: npt.NDArray[np.uint64]
    categories: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def pages(self) -> int:
        """Pages in all ranges."""
        return int((self.end - self.start).sum()) >> 12

    @property
    def any_of(self) -> int:
        """Category bits that any range has."""
        return int(np.bitwise_or.reduce(self.categories))


def scan(
    pagemap_fd: int,
    ranges: Iterable[tuple[int, int]],
    *,
    flags: ScanFlag = ScanFlag.NONE,
    mask: Category = Category.NONE,
    anyof: Category = Category.NONE,
    inverted: Category = Category.NONE,
    ret: Category = Category.NONE,
    vec_len: int = 1 << 15,
    max_pages: int = 0,
) -> Regions:
    """Scan each [start, end) of `ranges` (bytes, page-aligned), in order, and join the answers.

    A page matches if (categories ^ inverted) has all of `mask` and, where `anyof` is given, any of it. `ret`
    is what each region reports. Holes inside a range are no error: pass one range for the whole address
    space. vec_len 0: nothing is reported (with WP_MATCHING: only protect). max_pages 0: no limit (in all
    ranges). Raises OSError as the kernel does (EPERM under CHECK_WPASYNC, EINVAL for a category it does not
    know), CapabilityMissingError where the kernel has no PAGEMAP_SCAN, TargetGoneError where the address
    space is gone.
    """
    vec = _scratch(vec_len)
    arg = bytearray(_ARG.size)
    room = (vec.ctypes.data if vec_len else 0, vec_len)
    asked = (int(inverted), int(mask), int(anyof), int(ret))
    parts: list[Regions] = []
    left = max_pages
    for first, end in ranges:
        start = first
        while start < end:
            _ARG.pack_into(arg, 0, _ARG.size, int(flags), start, end, 0, *room, left, *asked)
            try:
                found: int = fcntl.ioctl(pagemap_fd, PAGEMAP_SCAN, arg, True)
            except OSError as exc:
                raise _explained(exc) from exc
            if found:
                row = vec[:found]
                parts.append(Regions(row["start"].copy(), row["end"].copy(), row["categories"].copy()))
                if max_pages:
                    left -= parts[-1].pages
                    if left <= 0:
                        return _joined(parts)
            walked: int = _ARG.unpack(arg)[_WALK_END]
            if vec_len:
                # do_pagemap_scan sets walk_end only where it is 0: after more than 512 regions it can be that of
                # an earlier part, whose regions would come twice. With room left, all was walked.
                walked = end if found < vec_len else max(walked, int(row["end"][-1]))
            if walked <= start:  # cannot happen by the interface's contract; never spin on it
                raise PagelensError(f"PAGEMAP_SCAN stands still at {start:#x}")
            start = walked
    return _joined(parts)


_LOCAL = threading.local()


def _scratch(length: int) -> npt.NDArray[np.void]:
    # One buffer a thread, kept: a fresh one is a mapping that faults page by page at every scan.
    held = getattr(_LOCAL, "vec", None)
    if held is None or len(held) < length:
        held = _LOCAL.vec = np.empty(length, dtype=_REGION)
    kept: npt.NDArray[np.void] = held[:length]
    return kept


def _joined(parts: list[Regions]) -> Regions:
    # By column: numpy takes a hundred times as long to join rows of fields.
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Regions(*(np.empty(0, np.uint64) for _ in range(3)))
    return Regions(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.end for part in parts]),
        np.concatenate([part.categories for part in parts]),
    )


def _explained(exc: OSError) -> Exception:
    if exc.errno == errno.ENOTTY:
        return CapabilityMissingError(
            "this kernel has no PAGEMAP_SCAN", capability="pagemap-scan", fix="boot Linux 6.7 or later"
        )
    if exc.errno == errno.ESRCH:
        return TargetGoneError("the process is gone")
    return exc


_SUPPORTED: dict[str, Category] = {}


def supported() -> Category:
    """The categories that this kernel knows, by scanning one page of this process; NONE without the ioctl."""
    if "now" not in _SUPPORTED:
        known = Category.NONE
        page = np.zeros(8192, np.uint8).ctypes.data & ~4095
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            for category in Category:
                try:
                    scan(file.fileno(), [(page, page + 4096)], anyof=category, ret=category, vec_len=1)
                except (OSError, CapabilityMissingError):
                    continue
                known |= category
        _SUPPORTED["now"] = known
    return _SUPPORTED["now"]
