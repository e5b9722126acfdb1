"""Backend `mprotect`: read-only pages and a SIGSEGV handler in the C core (native/barrier.c), this process only.

It needs nothing of the kernel beyond mprotect(2), so it works on every kernel and in every sandbox; it costs
6-7 µs a first write. What it cannot do is catch the kernel: a system call that writes into a protected page
(read(2) into a watched buffer) fails with EFAULT, no signal comes. `touch` opens pages beforehand for that.

It watches named ranges. Everything but the stacks is watched from C (native/barrier_all.c, CASES 7): a Python
interpreter's own system calls would fail under it.
Rejected: decoding the store (the page is enough), a handler in Python (cannot run inside a fault).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagelens.dirty import spans
from pagelens.dirty.epoch import Builder, Look, Semantics, Why
from pagelens.dirty.spans import Spans
from pagelens.linux import maps
from pagelens.linux.native import library
from pagelens.linux.procfs import Process
from pagelens.vm.errors import PagelensError, UsageError
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import Prot


class _Region(NamedTuple):
    start: int
    pages: int
    prot: int
    bits: mmap.mmap  # the handler's bitmap, in a mapping of its own: never on a watched page
    out: mmap.mmap


class Mprotect:
    """Watches `ranges` of this process."""

    semantics = Semantics(
        name="mprotect",
        scope="this process",
        needs="nothing of the kernel; the program must not set the protection of watched pages itself",
        extra=(Why.UNGUARDED,),
        too_much="ranges that the program made writable itself (UNGUARDED)",
        misses="writes by the kernel: a system call that writes to a protected page fails with EFAULT (`touch` "
        "opens it before); writes through another mapping",
        cost="6-7 µs at the first write to a page; a vma is split at every open page while an epoch lasts",
    )

    def __init__(self, proc: Process, *, ranges: Spans | None) -> None:
        if proc.pid != os.getpid():
            raise UsageError("the mprotect backend watches its own process only")
        if ranges is None:
            raise UsageError("the mprotect backend watches named buffers or ranges, not everything")
        self._proc = proc
        self._ranges = ranges
        self._lib = _functions()
        self._regions: list[_Region] = []
        self._live = False

    def arm(self) -> None:
        """Protect the ranges. UsageError where one is not writable private memory, or watched already."""
        _check(self._lib.pl_barrier_install(), "sigaction")
        _LIVE.add(id(self))
        self._live = True
        vmas = maps.read(self._proc)
        for start, end in self._ranges.pairs():
            at = start
            while at < end:
                vma = vmas.find(at)
                if vma is None or not vma.prot & Prot.WRITE:
                    raise UsageError(f"{at:#x} is not writable memory; the mprotect backend cannot watch it")
                stop = min(end, vma.end)
                self._add(at, stop, int(vma.prot))
                at = stop

    def _add(self, start: int, end: int, prot: int) -> None:
        pages = (end - start) >> PAGE_SHIFT
        size = max(PAGE_SIZE, (pages + 63) // 64 * 8)
        own = (
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # not shared with a forked child, whose writes are its own
        region = _Region(start, pages, prot, mmap.mmap(-1, size, own), mmap.mmap(-1, size, own))
        result = self._lib.pl_barrier_add(start, pages, prot, _address(region.bits))
        if result == -17:
            raise UsageError(f"{start:#x}-{end:#x} is watched by another mprotect tracker already")
        _check(result, "barrier")
        self._regions.append(region)
        _check(self._lib.pl_barrier_protect(start), "mprotect")

    def look(self) -> Look:
        """The pages whose bit is set; protected again."""
        vmas = maps.read(self._proc)
        builder = Builder()
        look = Look(builder, vmas)
        if not self._lib.pl_barrier_is_ours():
            _check(self._lib.pl_barrier_install(), "sigaction")
            look.notes.append(
                "the program installed a SIGSEGV handler of its own; the barrier is before it again"
            )
        for region in self._regions:
            start, end = region.start, region.start + region.pages * PAGE_SIZE
            # A range that is writable though no page of it was opened by us: the program did that.
            opened = spans.EMPTY
            for vma in vmas.overlapping(start, end):
                if vma.prot & Prot.WRITE:
                    part = (max(start, vma.start), min(end, vma.end))
                    opened = spans.union(opened, spans.of([part]))
            _check(self._lib.pl_barrier_collect(start, _address(region.out)), "mprotect")
            dirty = self._spans(region)
            builder.add(dirty, Why.WRITTEN)
            stolen = spans.minus(opened, dirty)
            if stolen:
                builder.add(stolen, Why.UNGUARDED)
                _check(self._lib.pl_barrier_protect(start), "mprotect")
        return look

    def _spans(self, region: _Region) -> Spans:
        bits = np.frombuffer(region.out, np.uint8)
        pages = np.flatnonzero(np.unpackbits(bits, bitorder="little")).astype(np.uint64)
        start = np.uint64(region.start) + (pages << np.uint64(PAGE_SHIFT))
        return spans.joined(start, start + np.uint64(PAGE_SIZE))

    def close(self) -> None:
        """Writable again; the program's handler back in its place when the last tracker goes."""
        for region in self._regions:
            self._lib.pl_barrier_drop(region.start)
        self._regions = []
        if self._live:
            self._live = False
            _LIVE.discard(id(self))
            if not _LIVE:
                self._lib.pl_barrier_remove()

    @property
    def faults(self) -> int:
        """Writes caught so far, by all trackers of this process."""
        return int(self._lib.pl_barrier_faults())


_LIVE: set[int] = set()


def touch(buffer: npt.NDArray[np.generic] | bytearray | memoryview | mmap.mmap) -> None:
    """Open the pages of a writable buffer for a system call that will write to them (they are listed).

    One byte of each page is read and written back."""
    view = np.frombuffer(buffer, np.uint8)
    view[::PAGE_SIZE] = view[::PAGE_SIZE]
    if len(view):
        view[-1] = view[-1]


def _address(area: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def _check(result: int, what: str) -> None:
    if result < 0:
        raise PagelensError(f"{what}: {os.strerror(-result)}")


def _functions() -> ctypes.CDLL:
    lib = library()
    word, size = ctypes.c_size_t, ctypes.c_size_t
    lib.pl_barrier_add.argtypes = (word, size, ctypes.c_int, ctypes.c_void_p)
    lib.pl_barrier_drop.argtypes = lib.pl_barrier_protect.argtypes = (word,)
    lib.pl_barrier_collect.argtypes = (word, ctypes.c_void_p)
    lib.pl_barrier_collect.restype = ctypes.c_long
    lib.pl_barrier_faults.restype = ctypes.c_uint64
    return lib
