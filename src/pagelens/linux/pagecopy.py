"""Pages in and out of another process, and their hashes (native/pagecopy.c).

`read` and `write` take runs (addresses and counts as numpy columns) and one flat buffer: no Python loop a
page. Pages that process_vm_readv refuses (PROT_NONE) are tried through /proc/PID/mem; what neither can do
is marked. Rejected: ptrace PEEKDATA (a word a call), /proc/PID/mem for everything (one call a run;
process_vm_readv takes 512 runs a call).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.linux.native import library
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from pagelens.vm.units import PAGE_SIZE

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]


@functools.cache
def _lib() -> Any:
    lib = library()
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    lib.pl_sum.restype = ctypes.c_uint64
    lib.pl_sum.argtypes = [pointer, size]
    lib.pl_sum_pages.restype = None
    lib.pl_sum_pages.argtypes = [pointer, size, pointer, pointer]
    for name in ("pl_vm_read", "pl_vm_write"):
        function = getattr(lib, name)
        function.restype = ctypes.c_long
        function.argtypes = [ctypes.c_int, ctypes.c_int, size, pointer, pointer, pointer, pointer]
    return lib


class MemoryFile:
    """/proc/PID/mem, opened for reading and, with `write`, writing. Context manager."""

    def __init__(self, pid: int, *, write: bool = False) -> None:
        try:
            self.fd = os.open(f"/proc/{pid}/mem", (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise TargetGoneError(f"process {pid} is gone") from None
        except PermissionError:
            raise CapabilityMissingError(
                f"the kernel refuses access to the memory of process {pid}",
                capability="ptrace",
                fix="run pagelens with sudo",
            ) from None

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def buffer(pages: int, *, ready: bool = False) -> U8:
    """uint8[pages * 4096], page-aligned, huge pages asked for. ready: faulted in now, so that first use does
    not cost faults (clearing pages takes as long as copying them)."""
    import mmap

    if not pages:
        return np.empty(0, np.uint8)
    area = mmap.mmap(-1, pages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pages >= 1024:
        area.madvise(mmap.MADV_HUGEPAGE)
    if ready:
        with contextlib.suppress(OSError):  # MADV_POPULATE_WRITE: Linux 5.14
            area.madvise(23)
    return np.frombuffer(area, np.uint8)


def read(pid: int, mem: MemoryFile, addr: U64, pages: U64, out: U8) -> U8:
    """Read runs into `out` (uint8, pages.sum() * 4096). Returns uint8[pages.sum()]: 1 = could not be read.

    Raises TargetGoneError, CapabilityMissingError (EPERM).
    """
    addr, pages = np.ascontiguousarray(addr, np.uint64), np.ascontiguousarray(pages, np.uint64)
    bad = np.zeros(len(out) // PAGE_SIZE, np.uint8)
    assert len(bad) == int(pages.sum())
    result = _lib().pl_vm_read(
        pid, mem.fd, len(addr), addr.ctypes.data, pages.ctypes.data, out.ctypes.data, bad.ctypes.data
    )
    _check(pid, int(result))
    return bad


_ROOM = 1024  # pages: 4 MiB, which stay in the cache between reading and hashing
_mine = threading.local()


def room() -> U8:
    """Memory of this thread for `hashes_of`, made at the first call: before a target is held, not while."""
    if not hasattr(_mine, "room"):
        _mine.room = buffer(_ROOM, ready=True)
    made: U8 = _mine.room
    return made


def hashes_of(pid: int, mem: MemoryFile, addr: U64) -> U64:
    """Hash of each page (ascending addresses) as it is now; of one that cannot be read, that of zeros. Errors as
    `read`."""
    out = np.empty(len(addr), np.uint64)
    for at in range(0, len(addr), _ROOM):
        part = addr[at : at + _ROOM]
        begins = np.flatnonzero(np.concatenate(([True], np.diff(part) != PAGE_SIZE)))
        count = np.diff(np.concatenate((begins, [len(part)]))).astype(np.uint64)
        data = room()[: len(part) * PAGE_SIZE]
        read(pid, mem, part[begins], count, data)
        out[at : at + _ROOM] = hash_pages(data)[0]
    return out


def write(pid: int, mem: MemoryFile, addr: U64, pages: U64, data: U8) -> U8:
    """Write runs from `data`. Returns uint8[pages.sum()]: 1 = could not be written. Errors as `read`."""
    addr, pages = np.ascontiguousarray(addr, np.uint64), np.ascontiguousarray(pages, np.uint64)
    bad = np.zeros(len(data) // PAGE_SIZE, np.uint8)
    assert len(bad) == int(pages.sum())
    result = _lib().pl_vm_write(
        pid, mem.fd, len(addr), addr.ctypes.data, pages.ctypes.data, data.ctypes.data, bad.ctypes.data
    )
    _check(pid, int(result))
    return bad


def _check(pid: int, result: int) -> None:
    if result >= 0:
        return
    if result == -3:
        raise TargetGoneError(f"process {pid} is gone")
    if result in (-1, -13):
        raise CapabilityMissingError(
            f"the kernel refuses access to the memory of process {pid}",
            capability="ptrace",
            fix="run pagelens with sudo",
        )
    raise OSError(-result, os.strerror(-result))


def hash_pages(data: U8) -> tuple[U64, npt.NDArray[np.bool_]]:
    """(uint64[pages] hash, bool[pages] all zero) of a flat buffer of whole pages."""
    pages = len(data) // PAGE_SIZE
    out, zero = np.empty(pages, np.uint64), np.empty(pages, np.uint8)
    _lib().pl_sum_pages(data.ctypes.data, pages, out.ctypes.data, zero.ctypes.data)
    return out, zero.view(np.bool_)


def hash_bytes(data: bytes | memoryview | U8) -> int:
    """The same hash over any bytes: the checksum of stored blocks."""
    flat = np.frombuffer(data, np.uint8)
    return int(_lib().pl_sum(flat.ctypes.data, len(flat)))
