"""Backend `uffd-sync`: userfaultfd write protection with a native handler thread (native/uffd_sync.c), for this
process: who wrote where, and when.

Each first write waits until the handler thread has noted its address, thread and time and has opened the page:
16-18 µs. `Epoch.details["writes"]` has them. `details["unseen"]` counts pages that lost their protection without
a message (their entry was dropped by DONTNEED, or the ring was full): they are listed all the same.

System calls that write to a watched page wait as well where the process may handle kernel faults
(CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1); elsewhere they fail with EFAULT, and a note says so.
Rejected: a handler in Python (the writer may hold the interpreter, and would wait for itself).
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

from pagelens.dirty import spans
from pagelens.dirty.epoch import Builder, Look, Semantics, Why
from pagelens.dirty.spans import Spans
from pagelens.linux import maps, pagemap
from pagelens.linux.native import library
from pagelens.linux.procfs import Process
from pagelens.linux.userfault import Feature, Mode, Userfault, available
from pagelens.vm.errors import CapabilityMissingError, PagelensError, UsageError
from pagelens.vm.pages import distinct
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE

WRITE = np.dtype([("addr", np.uint64), ("time_ns", np.uint64), ("tid", np.uint32), ("pad", np.uint32)])
_UFFD_WP = np.uint64(1 << 57)
_POPULATED = np.uint64(3 << 62)
_RING = 1 << 18
_MADV_POPULATE_READ = 22


class UffdSync:
    """Watches `ranges` of this process."""

    semantics = Semantics(
        name="uffd-sync",
        scope="this process",
        needs="userfaultfd write protection (Linux 5.7; reliable from about 5.10)",
        extra=(Why.DISCARDED,),
        too_much="pages whose entry was dropped (DONTNEED): they read as zeros now",
        misses="writes through another mapping of the same memory",
        cost="16-18 µs at the first write to a page, and a thread",
    )

    def __init__(self, proc: Process, *, ranges: Spans | None) -> None:
        if proc.pid != os.getpid():
            raise UsageError("the uffd-sync backend watches its own process only")
        if ranges is None:
            raise UsageError("the uffd-sync backend watches named buffers or ranges, not everything")
        self._proc = proc
        self._ranges = ranges
        self._lib = _functions()
        known = available()
        want = Feature.PAGEFAULT_FLAG_WP | Feature.THREAD_ID
        self._markers = Feature.WP_UNPOPULATED in known
        if self._markers:
            want |= Feature.WP_UNPOPULATED
        if Feature.WP_HUGETLBFS_SHMEM in known:
            want |= Feature.WP_HUGETLBFS_SHMEM
        self._notes: list[str] = []
        try:
            self._uffd = Userfault.create(want, user_mode_only=False)
        except CapabilityMissingError:
            self._uffd = Userfault.create(want)
            self._notes.append("system calls that write to a watched page fail with EFAULT (no privilege)")
        self._thread: int | None = None
        self._fd = -1

    def arm(self) -> None:
        """Register, protect, start the handler thread."""
        self._thread = self._lib.pl_uffd_sync_start(self._uffd.fd, _RING)
        if not self._thread:
            raise PagelensError(f"cannot start the handler: {os.strerror(ctypes.get_errno())}")
        self._fd = self._proc.fd("pagemap")
        for start, end in self._ranges.pairs():
            if not self._markers:  # without markers only populated pages can be protected: read each once
                self._lib_madvise(start, end)
            try:
                self._uffd.register(start, end, Mode.WP)
            except OSError as exc:
                raise UsageError(
                    f"{start:#x}-{end:#x} cannot be watched by userfaultfd: {exc.strerror}"
                ) from None
            self._uffd.writeprotect(start, end, protect=True)

    def look(self) -> Look:
        """Take the messages, list their pages and those without protection, protect again."""
        assert self._thread is not None
        builder = Builder()
        look = Look(builder, maps.read(self._proc))
        writes = np.empty(_RING, WRITE)
        count = self._lib.pl_uffd_sync_take(self._thread, writes.ctypes.data, _RING)
        writes = writes[:count].copy()
        seen = distinct(writes["addr"])
        builder.add(spans.joined(seen, seen + np.uint64(PAGE_SIZE)), Why.WRITTEN)
        unseen = 0
        for start, end in self._ranges.pairs():
            entry = pagemap.entries(self._fd, start, (end - start) >> PAGE_SHIFT)
            bare = (entry & _UFFD_WP) == 0
            for why, mask in (
                (Why.WRITTEN, bare & ((entry & _POPULATED) != 0)),
                (Why.DISCARDED, bare & ((entry & _POPULATED) == 0)),
            ):
                at = np.uint64(start) + (np.flatnonzero(mask).astype(np.uint64) << np.uint64(PAGE_SHIFT))
                where = spans.minus(spans.joined(at, at + np.uint64(PAGE_SIZE)), builder.seen)
                unseen += where.pages
                builder.add(where, why)
        # Whatever is written from here to its new protection is of this epoch: its page is listed already,
        # and its contents are read after this look.
        for start, end in builder.seen.pairs():
            self._uffd.writeprotect(start, end, protect=True)
        look.details["writes"] = writes
        look.details["unseen"] = unseen
        look.notes += self._notes
        if lost := int(self._lib.pl_uffd_sync_lost(self._thread)):
            look.notes.append(f"{lost} writes in all have no thread and time (the ring was full)")
        return look

    def close(self) -> None:
        """Closing the descriptor opens all pages and wakes who waits; then the thread ends."""
        if self._thread:
            for start, end in self._ranges.pairs():
                try:
                    self._uffd.unregister(start, end)
                except OSError:
                    continue  # unmapped meanwhile
            self._lib.pl_uffd_sync_stop(self._thread)
            self._thread = None
        self._uffd.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lib_madvise(self, start: int, end: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if libc.madvise(start, end - start, _MADV_POPULATE_READ):
            raise PagelensError(f"MADV_POPULATE_READ: {os.strerror(ctypes.get_errno())}")


def _functions() -> ctypes.CDLL:
    lib = library()
    lib.pl_uffd_sync_start.restype = ctypes.c_void_p
    lib.pl_uffd_sync_start.argtypes = (ctypes.c_int, ctypes.c_uint32)
    lib.pl_uffd_sync_take.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    lib.pl_uffd_sync_take.restype = ctypes.c_uint32
    lib.pl_uffd_sync_lost.argtypes = lib.pl_uffd_sync_stop.argtypes = (ctypes.c_void_p,)
    lib.pl_uffd_sync_lost.restype = ctypes.c_uint64
    lib.pl_uffd_sync_stop.restype = None
    return lib
