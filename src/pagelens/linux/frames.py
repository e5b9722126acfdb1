"""Frame columns: /proc/kpagecount and /proc/kpageflags by frame number (needs CAP_SYS_ADMIN).

Frame numbers are sorted, made unique and read by runs, so that a fragmented process costs one pread per run
of frames and a THP one for its 512 pages. Sources: fs/proc/page.c (kpagecount_read, kpageflags_read).
With CONFIG_NO_PAGE_MAPCOUNT (6.15 and later) kpagecount gives the average of a large folio, rounded up from
0.

KPF_KSM of 6.12 says nothing: fs/proc/page.c of that time (stable_page_flags) tests for one bit of two, and sets it for
every anonymous page (seen in Debian's 6.12.117; neither in 6.1 nor in 7.2). Where a page of our own shows that, the
bit is taken away from pages that are a process's own (PG_anon_exclusive, which a merged page never has), and from all
while KSM shares nothing; it stays where it may be true.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os

import numpy as np
import numpy.typing as npt

from pagelens.linux import native
from pagelens.linux.pagemap import PFN_MASK
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from pagelens.vm.pages import I64, U64, PageRuns
from pagelens.vm.units import PAGE_SHIFT

_NONE = np.uint64((1 << 64) - 1)  # no entry: neither file ever has this value
_PRESENT = 63  # bit of a pagemap entry
DIRTY = 1 << 4  # KPF_DIRTY (include/uapi/linux/kernel-page-flags.h)
KSM = 1 << 21  # KPF_KSM
_EXCLUSIVE = 1 << 34  # KPF_MAPPEDTODISK: of an anonymous page PG_anon_exclusive (include/linux/page-flags.h)
_ANON = 1 << 12  # KPF_ANON
COMPOUND = 1 << 15 | 1 << 16  # KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL
_GAP = 32  # frames: reading a few frames too many is cheaper than another pread


def lookup(name: str, pfn: U64) -> tuple[U64, npt.NDArray[np.bool_]]:
    """(uint64 values, bool known) of /proc/`name` (kpagecount, kpageflags, kpagecgroup) for each frame.

    Frame 0 stands for unknown. A frame outside of memory (device memory) is not known.
    Raises CapabilityMissingError where the file cannot be read.
    """
    unique, back = np.unique(pfn, return_inverse=True)
    values = np.full(len(unique), _NONE, dtype=np.uint64)
    if len(unique):
        far = np.flatnonzero(np.diff(unique) > np.uint64(_GAP)) + 1
        first = np.concatenate(([0], far))
        last = np.concatenate((far, [len(unique)])) - 1
        start, count = unique[first], unique[last] - unique[first] + np.uint64(1)
        entries = _read(name, start, count)
        # Where each run's entries begin in what was read, and each frame's place in its run.
        offset = np.concatenate((np.zeros(1, np.uint64), np.cumsum(count)[:-1].astype(np.uint64)))
        run = np.repeat(np.arange(len(first)), last - first + 1)
        values = entries[(offset[run] + unique - start[run]).astype(np.int64)]
        if not unique[0]:
            values[0] = _NONE
    known = values != _NONE
    values[~known] = 0
    if name == "kpageflags" and (values & np.uint64(KSM)).any():
        values = _without_false_ksm(values)
    return values[back], known[back]


def _without_false_ksm(flags: U64) -> U64:
    if not _ksm_bit_lies():
        return flags
    own = np.uint64(_ANON | _EXCLUSIVE)
    out: U64 = np.where(((flags & own) == own) | _ksm_is_idle(), flags & ~np.uint64(KSM), flags)
    return out


@functools.cache
def _ksm_bit_lies() -> bool:
    # Whether a page that nobody can have merged (its mapping was never given to KSM) has the bit.
    with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        place = np.array([ctypes.addressof(ctypes.c_char.from_buffer(page))], np.uint64)
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            frame = of_pages(fd, place, place + np.uint64(mmap.PAGESIZE))
        finally:
            os.close(fd)
        return bool(frame[0]) and bool(int(_read("kpageflags", frame, np.ones(1, np.uint64))[0]) & KSM)


def _ksm_is_idle() -> bool:
    try:
        with open("/sys/kernel/mm/ksm/pages_shared", "rb") as file:
            return not int(file.read())
    except OSError:
        return False


def _read(name: str, start: U64, count: U64) -> U64:
    try:
        fd = os.open(f"/proc/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _pread(fd, start, count)
        finally:
            os.close(fd)
    except OSError as exc:
        raise CapabilityMissingError(
            f"cannot read /proc/{name}: {exc.strerror}", capability=name, fix="run pagelens as root (sudo)"
        ) from None


def _pread(fd: int, start: U64, count: U64) -> U64:
    # The entries of all runs, one after another; _NONE behind the end of the file.
    out = np.full(int(count.sum()), _NONE, dtype=np.uint64)
    core = native.library()
    core.pl_pread_u64.argtypes = [ctypes.c_int, ctypes.c_size_t] + [ctypes.c_void_p] * 3
    start, count = np.ascontiguousarray(start), np.ascontiguousarray(count)
    error = core.pl_pread_u64(fd, len(start), start.ctypes.data, count.ctypes.data, out.ctypes.data)
    if error:
        raise OSError(-error, os.strerror(-error))
    return out


def of_pages(pagemap_fd: int, start: U64, end: U64) -> U64:
    """uint64[n]: the frame of each page of [start, end) (bytes), one span after another; 0 where the page is not
    present or the kernel hides it (CAP_SYS_ADMIN)."""
    entry = entries(pagemap_fd, start, end)
    entry[entry >> np.uint64(_PRESENT) == 0] = 0
    entry &= np.uint64(PFN_MASK)
    return entry


def entries(pagemap_fd: int, start: U64, end: U64) -> U64:
    """uint64[n]: the pagemap entry of each page of [start, end) (bytes), one span after another; 0 where there is
    none. Raises TargetGoneError where the address space is gone."""
    try:
        entry = _pread(pagemap_fd, start >> np.uint64(PAGE_SHIFT), (end - start) >> np.uint64(PAGE_SHIFT))
    except OSError as exc:
        if exc.errno == errno.ESRCH:
            raise TargetGoneError("the process is gone") from None
        raise
    entry[entry == _NONE] = 0
    return entry


def having(pagemap_fd: int, start: U64, end: U64, bits: int) -> U64:
    """uint64[n]: the addresses of those pages of [start, end) (bytes, ascending) whose frame has one of the flags
    `bits` (COMPOUND, KSM, …).

    Raises CapabilityMissingError where frames are hidden (CAP_SYS_ADMIN)."""
    count = (end - start) >> np.uint64(PAGE_SHIFT)
    entry = entries(pagemap_fd, start, end)
    here = (entry >> np.uint64(_PRESENT)).astype(bool)
    run = np.repeat(np.arange(len(start)), count.astype(np.int64))
    within = np.arange(len(entry), dtype=np.uint64) - (np.cumsum(count) - count)[run]
    address = (start[run] + (within << np.uint64(PAGE_SHIFT)))[here]
    flags, known = lookup("kpageflags", entry[here] & np.uint64(PFN_MASK))
    if len(known) and not known.any():
        raise CapabilityMissingError(
            "frame numbers are hidden", capability="kpageflags", fix="run pagelens as root (sudo)"
        )
    found: U64 = address[known & ((flags & np.uint64(bits)) != 0)]
    return found


def annotate(runs: PageRuns) -> PageRuns:
    """The same runs with mapcount (int64, -1 unknown) and kflags (uint64, 0 unknown). Needs `runs.pfn`."""
    if not len(runs):
        return runs
    if runs.pfn is None:
        raise ValueError("runs without frame numbers")
    count, known = lookup("kpagecount", runs.pfn)
    mapcount: I64 = np.where(known, count.astype(np.int64), np.int64(-1))
    kflags, known = lookup("kpageflags", runs.pfn)
    return PageRuns(runs.start, runs.count, runs.state, runs.pfn, mapcount, np.where(known, kflags, 0))
