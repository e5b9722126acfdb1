"""Contents of another process's pages, in bulk: process_vm_readv, and a hash of each (native/pagehash.c).

Rejected: /proc/PID/mem (a copy through one buffer a call; needed only where a page is not readable).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pagelens.linux.native import library
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from pagelens.vm.units import PAGE_SIZE

_BATCH = 8 << 20


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def read_into(pid: int, addr: int, out: npt.NDArray[np.uint8]) -> int:
    """Fill `out` from `addr`; returns the bytes read, fewer where a page is not readable or not mapped.

    Raises TargetGoneError where the process is gone, CapabilityMissingError without ptrace rights."""
    got = _readv(pid, addr, out.ctypes.data, out.nbytes)
    if got >= 0:
        return got
    number = ctypes.get_errno()
    if number == errno.ESRCH:
        raise TargetGoneError(f"process {pid} is gone")
    if number == errno.EPERM:
        raise CapabilityMissingError(
            f"no permission to read the memory of process {pid}",
            capability="other-users",
            fix="run pagelens as root (sudo)",
        )
    if number in (errno.EFAULT, errno.EIO):
        return 0
    raise OSError(number, os.strerror(number))


def read_memory(pid: int, addr: int, size: int) -> bytes:
    """`size` bytes of another process's memory; fewer where it ends or is not readable, none where it is gone."""
    buffer = ctypes.create_string_buffer(size)
    got = _readv(pid, addr, ctypes.addressof(buffer), size)
    return buffer.raw[:got] if got > 0 else b""


def hash_pages(
    pid: int, ranges: Iterable[tuple[int, int]]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """(uint64[pages], bool[pages]) of the pages of `ranges` ([(start, end)], bytes), in order: each page's
    hash and whether it could be read (its hash is 0 where not)."""
    spots = list(ranges)
    total = sum(end - start for start, end in spots) // PAGE_SIZE
    hashes = np.zeros(total, np.uint64)
    readable = np.zeros(total, bool)
    buffer = np.empty(min(_BATCH, max(PAGE_SIZE, total * PAGE_SIZE)), np.uint8)
    native = library().pl_page_sums
    native.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    native.restype = None
    done = 0
    for first, end in spots:
        start = first
        while start < end:
            want = min(len(buffer), end - start)
            pages = read_into(pid, start, buffer[:want]) // PAGE_SIZE
            if pages:
                native(buffer.ctypes.data, pages, hashes[done:].ctypes.data)
                readable[done : done + pages] = True
            step = pages if pages * PAGE_SIZE == want else pages + 1  # one page that cannot be read
            done += step
            start += step * PAGE_SIZE
    return hashes, readable


def _readv(pid: int, addr: int, into: int, size: int) -> int:
    # process_vm_readv of one range: bytes read, or -1 with ctypes.get_errno().
    local, remote = _Iovec(into, size), _Iovec(addr, size)
    return int(_libc().process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))


def _libc() -> ctypes.CDLL:
    lib = ctypes.CDLL(None, use_errno=True)
    lib.process_vm_readv.restype = ctypes.c_ssize_t
    lib.process_vm_readv.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip
    return lib
