"""Trials of memory capabilities: each does the thing once, on a page of its own, and looks whether it
happened.

A trial returns Outcome(works, what was seen, fix); an OSError means no. Trials leave nothing behind.
Those of tracing and of other processes are in `trials_trace`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagelens.linux import native, pagescan
from pagelens.linux.pagescan import Category

AS_ROOT = "run pagelens as root (sudo)"
NO_FIX = "none on this kernel"
PAGE = 4096
_LIBC = ctypes.CDLL(None, use_errno=True)

MADV_HUGEPAGE, MADV_PAGEOUT, MADV_GUARD_INSTALL = 14, 21, 102
_SYS_USERFAULTFD, _SYS_MSEAL = 323, 462
_UFFD_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
FEATURE = {"wp": 1 << 0, "minor_hugetlbfs": 1 << 9, "minor_shmem": 1 << 10, "wp_unpopulated": 1 << 13,
           "wp_async": 1 << 15, "move": 1 << 16}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial found."""

    works: bool
    detail: str
    fix: str = ""


Trial = Callable[[], Outcome]


class _Memory:
    # Anonymous private memory with its address; unmapped at the end.
    def __init__(self, pages: int = 1, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) -> None:
        self.map = mmap.mmap(-1, pages * PAGE, flags)
        self.addr = np.frombuffer(self.map, dtype=np.uint8).ctypes.data

    def entry(self, page: int = 0) -> int:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            return int(struct.unpack("Q", os.pread(file.fileno(), 8, (self.addr // PAGE + page) * 8))[0])

    def madvise(self, advice: int, length: int = PAGE, offset: int = 0) -> None:
        syscall("madvise", _LIBC.madvise(_VP(self.addr + offset), _SIZE(length), advice))


_VP, _SIZE, _LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long


def syscall(what: str, result: int) -> int:
    """The result of a libc call, or OSError from errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _raw(number: int, *args: int) -> int:
    return syscall(f"system call {number}", _LIBC.syscall(_LONG(number), *(_LONG(a) for a in args)))


def root() -> Outcome:
    """Effective uid 0."""
    uid = os.geteuid()
    return Outcome(uid == 0, f"uid {uid}", AS_ROOT)


def native_loads() -> Outcome:
    """The C core loads."""
    native.library()
    return Outcome(True, "loaded")


def pagemap() -> Outcome:
    """A written page shows as present in our own pagemap."""
    memory = _Memory()
    before = memory.entry() >> 63
    memory.map[0] = 1
    after = memory.entry() >> 63
    return Outcome((before, after) == (0, 1), "a written page is shown as present", NO_FIX)


def pagemap_scan() -> Outcome:
    """The ioctl exists; which categories it knows."""
    known = pagescan.supported()
    if not known:
        return Outcome(False, "no such ioctl", "boot Linux 6.7 or later")
    lacks = [c.name or "" for c in Category if c not in known]
    return Outcome(True, "all categories" if not lacks else f"without {', '.join(lacks)}")


def pfn() -> Outcome:
    """The frame number of our own written page is not zero."""
    memory = _Memory()
    memory.map[0] = 1
    seen = memory.entry() & ((1 << 55) - 1) != 0
    return Outcome(seen, "visible" if seen else "the kernel shows 0", f"{AS_ROOT}: needs CAP_SYS_ADMIN")


def _kpage(name: str) -> Outcome:
    with open(f"/proc/{name}", "rb", buffering=0) as file:
        file.read(8)
    return Outcome(True, "can be read")


def kpagecount() -> Outcome:
    """/proc/kpagecount gives an entry."""
    return _kpage("kpagecount")


def kpageflags() -> Outcome:
    """/proc/kpageflags gives an entry."""
    return _kpage("kpageflags")


def kpagecgroup() -> Outcome:
    """/proc/kpagecgroup gives an entry."""
    return _kpage("kpagecgroup")


def soft_dirty() -> Outcome:
    """Write, clear, look, write, look: in a child, because the clear is for a whole process."""
    result = native.library().pl_probe_soft_dirty()
    match result:
        case 0:
            return Outcome(True, "a write sets the bit, clear_refs clears it")
        case 1:
            return Outcome(
                False,
                "clear_refs is accepted, but a write never sets the bit (CONFIG_MEM_SOFT_DIRTY is off)",
                "boot a kernel with CONFIG_MEM_SOFT_DIRTY (Debian's have it); uffd-wp tracks writes here",
            )
    return Outcome(False, "clear_refs or pagemap is refused", AS_ROOT)


def guard_pages() -> Outcome:
    """MADV_GUARD_INSTALL on a page of ours."""
    try:
        _Memory().madvise(MADV_GUARD_INSTALL)
    except OSError as exc:
        return Outcome(False, exc.strerror or "", "boot Linux 6.13 or later (pagemap shows them from 6.15)")
    memory = _Memory()
    memory.madvise(MADV_GUARD_INSTALL)
    shown = bool(memory.entry() >> 58 & 1)
    detail = "installed and shown" if shown else "not shown in pagemap"
    return Outcome(shown, detail, "boot Linux 6.15 or later")


def _uffd(flags: int) -> int:
    return _raw(_SYS_USERFAULTFD, flags | os.O_CLOEXEC)


def uffd_features() -> tuple[int, bool]:
    """(feature bits, whether faults taken in the kernel are handled too). OSError where there is no
    userfaultfd."""
    try:
        fd, kernel = _uffd(0), True
    except OSError as exc:
        if exc.errno != errno.EPERM:
            raise
        fd, kernel = _uffd(_UFFD_USER_MODE_ONLY), False
    try:
        answer = fcntl.ioctl(fd, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, 0, 0))
        return int(struct.unpack("QQQ", answer)[1]), kernel
    finally:
        os.close(fd)


def userfaultfd() -> Outcome:
    """A userfaultfd can be made and agrees on its API."""
    try:
        features, kernel = uffd_features()
    except OSError as exc:
        fix = "allow userfaultfd in the container's seccomp profile" if exc.errno == errno.EPERM else NO_FIX
        return Outcome(False, exc.strerror or "", fix)
    return Outcome(True, f"features {features:#x}{'' if kernel else ', user-mode faults only'}")


def uffd_kernel() -> Outcome:
    """userfaultfd without UFFD_USER_MODE_ONLY."""
    _, kernel = uffd_features()
    fix = "sudo sysctl vm.unprivileged_userfaultfd=1 (or run as root)"
    return Outcome(kernel, "handled" if kernel else "user-mode faults only", fix)


def _uffd_feature(name: str, since: str) -> Outcome:
    features, _ = uffd_features()
    has = bool(features & FEATURE[name])
    return Outcome(has, f"features {features:#x}", f"boot Linux {since} or later")


def uffd_wp() -> Outcome:
    """UFFD_FEATURE_PAGEFAULT_FLAG_WP."""
    return _uffd_feature("wp", "5.7")


def uffd_wp_async() -> Outcome:
    """UFFD_FEATURE_WP_ASYNC and WP_UNPOPULATED."""
    return _uffd_feature("wp_async", "6.7")


def uffd_minor() -> Outcome:
    """UFFD_FEATURE_MINOR_SHMEM."""
    return _uffd_feature("minor_shmem", "5.14")


def thp() -> Outcome:
    """MADV_HUGEPAGE and a first touch give a PMD-mapped page (by PAGEMAP_SCAN, else AnonHugePages of
    smaps)."""
    memory = _Memory(1536)
    aligned = (memory.addr + (2 << 20) - 1) & -(2 << 20)
    fix = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    setting = _text("/sys/kernel/mm/transparent_hugepage/enabled") or "no THP in this kernel"
    try:
        memory.madvise(MADV_HUGEPAGE, 2 << 20, aligned - memory.addr)
    except OSError:
        return Outcome(False, setting, fix)
    memory.map[aligned - memory.addr] = 1
    if Category.HUGE in pagescan.supported():
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            found = pagescan.scan(
                file.fileno(), [(aligned, aligned + PAGE)], mask=Category.HUGE, ret=Category.HUGE, vec_len=1
            )
        huge = len(found) > 0
    else:
        huge = memory.entry((aligned - memory.addr) // PAGE + 511) >> 63 == 1
    return Outcome(huge, f"enabled: {setting}" + ("" if huge else "; the trial got none (fragmented?)"), fix)


def hugetlb() -> Outcome:
    """A MAP_HUGETLB mapping succeeds."""
    fix = "sudo sysctl vm.nr_hugepages=16"
    try:
        mmap.mmap(-1, 2 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000).close()
    except OSError as exc:
        return Outcome(False, exc.strerror or "", fix)
    return Outcome(True, f"{_text('/proc/sys/vm/nr_hugepages')} huge pages")


def swap() -> Outcome:
    """MADV_PAGEOUT moves a page of ours to swap."""
    fix = "add swap: sudo fallocate -l 1G /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
    areas = len((_text("/proc/swaps") or "").splitlines()) - 1
    if areas <= 0:
        return Outcome(False, "no swap area", fix)
    memory = _Memory(16)
    memory.map[0] = 1
    memory.madvise(MADV_PAGEOUT)
    gone = memory.entry() >> 63 == 0
    return Outcome(True, f"{areas} area(s)" + ("" if gone else "; the trial page stayed (lru batch)"), fix)


def numa_balancing() -> Outcome:
    """The sysctl exists; whether it is on."""
    value = _text("/proc/sys/kernel/numa_balancing")
    if value is None:
        return Outcome(False, "no such sysctl (CONFIG_NUMA_BALANCING is off)", NO_FIX)
    return Outcome(value != "0", "on" if value != "0" else "off", "sudo sysctl kernel.numa_balancing=1")


def ksm() -> Outcome:
    """/sys/kernel/mm/ksm/run is 1."""
    value = _text("/sys/kernel/mm/ksm/run")
    return Outcome(value == "1", {None: "not in this kernel", "1": "running"}.get(value, "stopped"),
                   NO_FIX if value is None else "echo 1 | sudo tee /sys/kernel/mm/ksm/run")  # fmt: skip


def damon() -> Outcome:
    """DAMON's sysfs interface, and its operations."""
    base = Path("/sys/kernel/mm/damon/admin/kdamonds")
    if not base.is_dir():
        return Outcome(False, "no DAMON sysfs interface", NO_FIX)
    operations = sorted(
        {op for path in base.glob("*/contexts/*/avail_operations") for op in path.read_text().split()}
    )
    return Outcome(True, f"operations: {' '.join(operations) or 'unknown until a context is made'}")


def idle_pages() -> Outcome:
    """/sys/kernel/mm/page_idle/bitmap can be read."""
    path = Path("/sys/kernel/mm/page_idle/bitmap")
    if not path.exists():
        return Outcome(False, "not in this kernel (CONFIG_IDLE_PAGE_TRACKING is off)", NO_FIX)
    with path.open("rb", buffering=0) as file:
        file.read(8)
    return Outcome(True, "can be read")


def anon_names() -> Outcome:
    """PR_SET_VMA_ANON_NAME on a page of ours shows in maps."""
    memory = _Memory()
    name = ctypes.create_string_buffer(b"pagelens trial")
    fix = "boot a kernel with CONFIG_ANON_VMA_NAME"
    result = _LIBC.prctl(0x53564D41, _LONG(0), _LONG(memory.addr), _LONG(PAGE), name)
    if result < 0:
        return Outcome(False, "refused (CONFIG_ANON_VMA_NAME is off)", fix)
    shown = b"[anon:pagelens trial]" in Path("/proc/self/maps").read_bytes()
    return Outcome(shown, "shown in maps" if shown else "not shown in maps", fix)


def mseal() -> Outcome:
    """mseal(2) of nothing: ENOSYS tells."""
    _raw(_SYS_MSEAL, 0, 0, 0)
    return Outcome(True, "there", "boot Linux 6.10 or later")


def mlock() -> Outcome:
    """mlock(2) of a page of ours."""
    memory = _Memory()
    if _LIBC.mlock(_VP(memory.addr), _SIZE(PAGE)) < 0:
        return Outcome(False, os.strerror(ctypes.get_errno()), "ulimit -l unlimited (or CAP_IPC_LOCK)")
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Outcome(True, "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft >> 10} KiB")


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
