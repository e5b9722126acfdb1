"""What the page cache holds of the files that a process maps, and in folios of which order.

Fault-around maps cached neighbours of a faulting page without any event, and a large folio whole where it fits:
to replay a recording, the model must know what was cached, and how. mincore(2) tells residency page by page
(cachestat only sums; reading through the file would change what is asked). Orders come from kpageflags, for
pages that the process maps: a folio is a head and the tails behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagelens.linux import pagemap
from pagelens.linux.frames import lookup
from pagelens.linux.native import library
from pagelens.linux.procfs import Process
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.pages import I64, U64
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import Vma, VmaList

UNKNOWN_ORDER = -1
_HEAD, _TAIL = 1 << 15, 1 << 16  # include/uapi/linux/kernel-page-flags.h
_BLOCK = 512  # frames: no file folio is larger, and each is aligned to its size


@dataclass(frozen=True, slots=True)
class FilePages:
    """Cached pages of one file, as runs of equal order.

    start: int64[n], page index in the file. count: int64[n], pages. order: int8[n], of the folio, or -1 where it
    is not known (cached, but not mapped by the process, or frames may not be seen).
    """

    dev: str
    inode: int
    path: str
    start: I64
    count: I64
    order: npt.NDArray[np.int8]

    @property
    def pages(self) -> int:
        """Cached pages in all."""
        return int(self.count.sum())


def read(proc: Process, vmas: VmaList) -> tuple[list[FilePages], int]:
    """Cached pages of each file that the process maps, over the mapped part of the file only; and the number of
    files that could not be asked (gone, replaced, or without the right to open them)."""
    found: list[FilePages] = []
    refused = 0
    files: dict[tuple[str, int], list[Vma]] = {}
    for vma in vmas:
        if vma.inode and vma.name.startswith("/"):
            files.setdefault((vma.dev, vma.inode), []).append(vma)
    orders = _orders(proc, files)
    for key, mapped in files.items():
        first = min(v.offset for v in mapped) >> PAGE_SHIFT
        last = max(v.offset + v.size for v in mapped) >> PAGE_SHIFT
        try:
            with _opened(proc, mapped[0]) as fd:
                cached = _mincore(fd, first, last - first)
        except OSError:
            refused += 1
            continue
        order = np.full(len(cached), UNKNOWN_ORDER, np.int8)
        index, known = orders.get(key, (np.empty(0, np.int64), np.empty(0, np.int8)))
        inside = (index >= first) & (index < first + len(cached))
        order[index[inside] - first] = known[inside]
        found.append(_runs(key, mapped[0].name, first, cached, order))
    return found, refused


@contextlib.contextmanager
def _opened(proc: Process, vma: Vma) -> Iterator[int]:
    # map_files is the very file, also when it was deleted or replaced; it needs CAP_CHECKPOINT_RESTORE. Else the
    # path, if it still names that inode.
    try:
        fd = proc.fd(f"map_files/{vma.start:x}-{vma.end:x}")
    except (CapabilityMissingError, OSError):
        fd = os.open(vma.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if os.fstat(fd).st_ino != vma.inode:
            os.close(fd)
            raise FileNotFoundError(vma.name) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _mincore(fd: int, first: int, pages: int) -> npt.NDArray[np.bool_]:
    size = -(-os.fstat(fd).st_size // PAGE_SIZE)
    cached = np.zeros(max(0, min(pages, size - first)), np.uint8)
    ask = library().pl_residency
    ask.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p]
    error = -ask(fd, first, len(cached), cached.ctypes.data)
    if error:
        raise OSError(error, os.strerror(error))
    return cached.astype(np.bool_)


def _orders(
    proc: Process, files: dict[tuple[str, int], list[Vma]]
) -> dict[tuple[str, int], tuple[I64, npt.NDArray[np.int8]]]:
    # (page index, order) of the file pages that the process has mapped; nothing without the right to see frames.
    out: dict[tuple[str, int], tuple[I64, npt.NDArray[np.int8]]] = {}
    mapped = VmaList([v for vmas in files.values() for v in vmas])
    if not len(mapped):
        return out
    try:
        runs = pagemap.read(proc, mapped, pfns=True).runs
        if runs.pfn is None or not runs.pages:
            return out
        order = folio_orders(runs.pfn)
    except CapabilityMissingError:
        return out
    addr, state = runs.addresses(), runs.states()
    vma_of = mapped.find_many(addr)
    is_file = ((state & 4) != 0) & (order >= 0)  # PageState.FILE: not a private copy
    for i, vma in enumerate(mapped):
        mine = is_file & (vma_of == i)
        index = ((addr[mine] - np.uint64(vma.start) + np.uint64(vma.offset)) >> np.uint64(PAGE_SHIFT)).astype(
            np.int64
        )
        key = (vma.dev, vma.inode)
        before = out.get(key, (np.empty(0, np.int64), np.empty(0, np.int8)))
        out[key] = (np.concatenate((before[0], index)), np.concatenate((before[1], order[mine])))
    return out


def folio_orders(pfn: U64) -> npt.NDArray[np.int8]:
    """int8 order of the folio that holds each frame; -1 where the frame is unknown (0) or has no struct page.

    Raises CapabilityMissingError where kpageflags cannot be read.
    """
    flags, known = lookup("kpageflags", pfn)
    order = np.where(known & (pfn != 0), 0, UNKNOWN_ORDER).astype(np.int8)
    large = known & ((flags & np.uint64(_HEAD | _TAIL)) != 0)
    if not large.any():
        return order
    blocks: U64 = np.unique(pfn[large] // np.uint64(_BLOCK))
    frames: U64 = np.add.outer(blocks * np.uint64(_BLOCK), np.arange(_BLOCK, dtype=np.uint64)).ravel()
    around, _ = lookup("kpageflags", frames)
    tail = ((around & np.uint64(_TAIL)) != 0).reshape(-1, _BLOCK)
    begins = np.where(tail, 0, np.arange(_BLOCK))
    head = np.maximum.accumulate(begins, axis=1)  # of each frame: where its folio begins, within the block
    size = np.zeros_like(head)
    np.add.at(size, (np.arange(len(blocks))[:, None], head), 1)
    block = np.searchsorted(blocks, pfn[large] // np.uint64(_BLOCK))
    at = (pfn[large] % np.uint64(_BLOCK)).astype(np.int64)
    order[large] = np.log2(size[block, head[block, at]]).astype(np.int8)
    return order


def _runs(
    key: tuple[str, int], path: str, first: int, cached: npt.NDArray[np.bool_], order: npt.NDArray[np.int8]
) -> FilePages:
    where = np.flatnonzero(cached)
    if not len(where):
        empty = np.empty(0, np.int64)
        return FilePages(*key, path, empty, empty, np.empty(0, np.int8))
    breaks = np.flatnonzero((np.diff(where) != 1) | (np.diff(order[where]) != 0)) + 1
    begin = np.concatenate(([0], breaks))
    count = np.diff(np.concatenate((begin, [len(where)])))
    return FilePages(*key, path, where[begin] + first, count, order[where[begin]])
