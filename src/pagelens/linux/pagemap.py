"""Page states of an address space, in bulk: /proc/PID/pagemap, with PAGEMAP_SCAN where the kernel has it.

PAGEMAP_SCAN finds what exists (it skips holes by the page-table page, and knows huge and zero pages), then
only those ranges are read from pagemap, which alone knows EXCLUSIVE, the uffd-wp bit and frame numbers.
Without the ioctl (before 6.7) each vma is read whole; the kernel walks holes quickly, but it writes 8 bytes
for each page of them, so this costs by what is mapped: the 18 TiB that AddressSanitizer reserves took half a
minute, in which a recorded program stood still. So a caller may set a limit: the longest vmas are then not read
where the ioctl is missing, and that is said.

Sources: pagemap(5), fs/proc/task_mmu.c (pte_to_pagemap_entry, pagemap_pmd_range_thp).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagelens.linux import pagescan
from pagelens.linux.pagescan import Category
from pagelens.linux.procfs import Process
from pagelens.vm.errors import TargetGoneError
from pagelens.vm.pages import U32, U64, PageRuns, PageState
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import VmaList

PFN_MASK = (1 << 55) - 1
SWP_PTE_MARKER = 31  # the highest swap type: a pte marker, not swap (include/linux/swapops.h)
_GAP = 256  # pages: a hole this small is cheaper to read than a second pread
_CHUNK = 1 << 18  # entries a pread (2 MiB)
MOST = 1 << 26  # pages, 256 GiB: half a second without PAGEMAP_SCAN

# Top nine bits (63..55) of an entry -> PageState.
_BITS = {
    0: PageState.SOFT_DIRTY,
    1: PageState.EXCLUSIVE,
    2: PageState.UFFD_WP,
    3: PageState.GUARD,
    6: PageState.FILE,
    7: PageState.SWAPPED,
    8: PageState.PRESENT,
}
_LUT = np.zeros(512, dtype=np.uint32)
for _bit, _state in _BITS.items():
    _LUT[(np.arange(512) >> _bit) & 1 == 1] |= np.uint32(_state)
# A guard marker is stored like a swap entry and reads as one; nothing is in swap.
_GUARDED = (_LUT & np.uint32(PageState.GUARD)) != 0
_LUT[_GUARDED] &= ~np.uint32(PageState.SWAPPED)

_EXISTS = Category.PRESENT | Category.SWAPPED
_WANTED = _EXISTS | Category.PFNZERO | Category.HUGE


@dataclass(frozen=True, slots=True)
class PageTable:
    """Result of `read`. method: what was used; notes: what could not be known; complete: every vma was read."""

    runs: PageRuns
    method: str
    notes: tuple[str, ...] = ()
    complete: bool = True


def read(
    proc: Process,
    vmas: VmaList,
    *,
    within: tuple[int, int] | None = None,
    pfns: bool = False,
    most: int | None = None,
) -> PageTable:
    """States of all pages of `vmas` that have a pte (present, swapped or marked), cut to `within`.

    most: without PAGEMAP_SCAN, no more pages than these are asked for, the shortest vmas' first (None: all are).
    With `pfns`, the frame number of each present page (0 where the kernel hides it: needs CAP_SYS_ADMIN).
    """
    spans = _spans(vmas, within)
    notes: tuple[str, ...] = ()
    left = 0
    fd = proc.fd("pagemap")
    try:
        if not spans:
            return PageTable(PageRuns.empty(), "pagemap")
        known = pagescan.supported()
        if Category.PRESENT in known:
            found = pagescan.scan(fd, spans, anyof=_EXISTS, ret=known & _WANTED)
            addr, entry = _entries(fd, _coalesce(found.start, found.end))
            extra = _extra(found, addr)
            method = "PAGEMAP_SCAN+pagemap"
        else:
            spans, left = _affordable(_spans(vmas, within, join=False), most)
            addr, entry = _entries(fd, spans)
            extra = None
            method = "pagemap"
            which = "huge pages" if _zero_frame() else "huge and zero pages"
            notes += (f"{which} are not told apart (no PAGEMAP_SCAN)",)
            if left:
                notes += (
                    f"pages of the longest mappings, {left >> 18} GiB in all, not read (no PAGEMAP_SCAN)",
                )
    finally:
        os.close(fd)
    state, pfn = decode(entry)
    if extra is None and _zero_frame():
        # One frame serves all reads of memory that was never written (not the huge zero page).
        state[pfn == np.uint64(_zero_frame())] |= np.uint32(PageState.ZERO)
    if extra is not None:
        present = (state & np.uint32(PageState.PRESENT)) != 0
        state |= np.where(present, extra, np.uint32(0))
    return PageTable(PageRuns.from_pages(addr, state, pfn=pfn if pfns else None), method, notes, not left)


@functools.cache
def _zero_frame() -> int:
    # The zero page's frame number, from a page of our own that is only read; 0 where frames are hidden.
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        assert page[0] == 0
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            entry = int(entries(fd, address, 1)[0])
        finally:
            os.close(fd)
    return entry & PFN_MASK if entry >> 63 else 0


def decode(entry: U64) -> tuple[U32, U64]:
    """(uint32 states, uint64 frame numbers) of pagemap entries; frames are 0 where hidden or not present."""
    state = _LUT[(entry >> np.uint64(55)).astype(np.uint16)]
    frame = entry & np.uint64(PFN_MASK)
    present = (entry >> np.uint64(63)) != 0
    if not present.all():
        # Frame numbers visible: a swap entry's type is in the low five bits, and a pte marker is told from
        # swap.
        marker = ~present & ((frame & np.uint64(31)) == SWP_PTE_MARKER)
        state[marker] &= ~np.uint32(PageState.SWAPPED)
        frame[~present] = 0
    return state, frame


def entries(fd: int, start: int, pages: int) -> U64:
    """Raw pagemap entries of `pages` pages from `start`; shorter at the end of user space.

    Raises TargetGoneError where the address space is gone.
    """
    out = np.zeros(pages, dtype=np.uint64)
    done = 0
    view = out.data.cast("B")
    while done < pages:
        want = min(_CHUNK, pages - done)
        try:
            got = os.preadv(fd, [view[done * 8 : (done + want) * 8]], ((start >> PAGE_SHIFT) + done) * 8)
        except OSError as exc:
            if exc.errno == errno.ESRCH:
                raise TargetGoneError("the process is gone") from None
            raise
        if got < 8:
            break
        done += got // 8
    return out[:done]


def _spans(vmas: VmaList, within: tuple[int, int] | None, *, join: bool = True) -> list[tuple[int, int]]:
    # Adjacent vmas joined, cut to `within`.
    spans: list[tuple[int, int]] = []
    for start, end in zip(vmas.starts.tolist(), vmas.ends.tolist(), strict=True):
        if within is not None:
            start, end = max(start, within[0]), min(end, within[1])  # noqa: PLW2901 (cut to the range)
            if start >= end:
                continue
        if join and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _affordable(spans: list[tuple[int, int]], most: int | None) -> tuple[list[tuple[int, int]], int]:
    # (spans to read, pages of the others): the shortest, until the sum is too much.
    if most is None:
        return spans, 0
    lengths = np.array([end - start for start, end in spans], dtype=np.uint64) >> np.uint64(PAGE_SHIFT)
    order = np.argsort(lengths, kind="stable")
    within = np.cumsum(lengths[order]) <= most
    kept = np.sort(order[within])
    return [spans[i] for i in kept.tolist()], int(lengths[order[~within]].sum())


def _coalesce(start: U64, end: U64) -> list[tuple[int, int]]:
    # Regions joined over small gaps: fewer, longer reads.
    if not len(start):
        return []
    far = np.flatnonzero(start[1:] - end[:-1] > np.uint64(_GAP * PAGE_SIZE)) + 1
    first = np.concatenate(([0], far))
    last = np.concatenate((far, [len(start)])) - 1
    return list(zip(start[first].tolist(), end[last].tolist(), strict=True))


def _entries(fd: int, spans: Iterable[tuple[int, int]]) -> tuple[U64, U64]:
    # (addresses, entries) of all pages in spans that have a non-empty entry (soft-dirty alone is a vma's
    # flag). In pieces, of which only what exists is kept: without PAGEMAP_SCAN a sparse terabyte is 2 GiB of
    # zeros.
    addrs, values = [], []
    pieces = (
        (at, min(end, at + _CHUNK * PAGE_SIZE))
        for s, end in spans
        for at in range(s, end, _CHUNK * PAGE_SIZE)
    )
    for start, end in pieces:
        value = entries(fd, start, (end - start) >> PAGE_SHIFT)
        if not value.any():
            continue
        keep = np.flatnonzero(value >> np.uint64(56))
        addrs.append((keep.astype(np.uint64) << np.uint64(PAGE_SHIFT)) + np.uint64(start))
        values.append(value if len(keep) == len(value) else value[keep])
    if not addrs:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    return np.concatenate(addrs), np.concatenate(values)


def _extra(found: pagescan.Regions, addr: U64) -> npt.NDArray[np.uint32]:
    # HUGE and ZERO of each address, from the scan's regions.
    extra = np.zeros(len(addr), dtype=np.uint32)
    if not len(found):
        return extra
    state = np.zeros(len(found), dtype=np.uint32)
    state[(found.categories & np.uint64(Category.HUGE)) != 0] |= np.uint32(PageState.HUGE)
    state[(found.categories & np.uint64(Category.PFNZERO)) != 0] |= np.uint32(PageState.ZERO)
    if not state.any():
        return extra
    index = np.searchsorted(found.start, addr, side="right") - 1
    inside = (index >= 0) & (addr < found.end[np.maximum(index, 0)])
    return np.where(inside, state[np.maximum(index, 0)], extra)
