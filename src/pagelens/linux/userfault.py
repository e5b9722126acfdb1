"""userfaultfd, typed (fs/userfaultfd.c, mm/userfaultfd.c; userfaultfd(2), ioctl_userfaultfd(2)).

One object owns one descriptor, of this process or taken out of another one (`inject.take_userfaultfd`): every
ioctl acts on the address space that created the descriptor, whoever holds it. Closing the last descriptor
unregisters everything, and that is the clean-up even of a process that was killed.

The header may be older than the kernel (Debian 12 has 6.1's), so the numbers are written down here.
Rejected: the /dev/userfaultfd device (it makes descriptors for the caller only, and needs a device node).
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Self

from pagelens.vm.closing import Closing
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError

NR_USERFAULTFD = 323
API = 0xAA
USER_MODE_ONLY = 1


class Feature(enum.IntFlag):
    """UFFD_FEATURE_* of include/uapi/linux/userfaultfd.h."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


NO_FEATURES = Feature(0)


class Mode(enum.IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults a range sends."""

    MISSING = 1
    WP = 2
    MINOR = 4


_IOC_API = 0xC018AA3F
_IOC_REGISTER = 0xC020AA00
_IOC_UNREGISTER = 0x8010AA01
_IOC_WAKE = 0x8010AA02
_IOC_COPY = 0xC028AA03
_IOC_ZEROPAGE = 0xC020AA04
_IOC_WRITEPROTECT = 0xC018AA06
_IOC_CONTINUE = 0xC020AA07

COPY_DONTWAKE = 1
COPY_WP = 2
WP_PROTECT = 1
WP_DONTWAKE = 2

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16
FAULT_WRITE = 1
FAULT_WP = 2
FAULT_MINOR = 4
MSG_SIZE = 32


@dataclass(frozen=True, slots=True)
class Message:
    """One event. event: EVENT_*; for a page fault: flags (FAULT_*), address (bytes; the page's start unless
    EXACT_ADDRESS), tid (0 unless THREAD_ID); for the others: a, b, c as the union's three words."""

    event: int
    flags: int = 0
    address: int = 0
    tid: int = 0
    a: int = 0
    b: int = 0
    c: int = 0

    @classmethod
    def parse(cls, data: bytes) -> Message:
        """From the 32 bytes of struct uffd_msg."""
        event = data[0]
        first, second, third = struct.unpack_from("<QQQ", data, 8)
        if event == EVENT_PAGEFAULT:
            return cls(event, flags=first, address=second, tid=third & 0xFFFFFFFF)
        return cls(event, a=first, b=second, c=third)


class Userfault(Closing):
    """A userfaultfd. Use as a context manager; closing it unregisters every range."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.features = Feature(0)

    @classmethod
    def create(cls, features: Feature = NO_FEATURES, *, user_mode_only: bool = True) -> Self:
        """One for this process. Kernel-mode faults reach a handler only with user_mode_only=False, which
        needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1; WP_ASYNC never needs it.

        Raises CapabilityMissingError where the kernel or a seccomp profile refuses."""
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (USER_MODE_ONLY if user_mode_only else 0)
        fd = _libc().syscall(NR_USERFAULTFD, flags)
        if fd < 0:
            raise refused(ctypes.get_errno())
        uffd = cls(fd)
        try:
            uffd.handshake(features)
        except BaseException:
            uffd.close()
            raise
        return uffd

    def handshake(self, features: Feature) -> Feature:
        """UFFDIO_API. Returns all features that the kernel has; raises CapabilityMissingError where it lacks
        one of those asked for (EINVAL)."""
        arg = bytearray(struct.pack("<QQQ", API, int(features), 0))
        try:
            fcntl.ioctl(self.fd, _IOC_API, arg)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                raise CapabilityMissingError(
                    f"this kernel's userfaultfd lacks {features!r}",
                    capability="uffd-wp-async" if Feature.WP_ASYNC in features else "userfaultfd",
                    fix="boot Linux 6.7 or later" if Feature.WP_ASYNC in features else "",
                ) from None
            if exc.errno == errno.EPERM:
                raise refused(errno.EPERM) from None
            raise
        self.features = features
        return Feature(struct.unpack("<QQQ", arg)[1] & (2 * Feature.MOVE - 1))

    def register(self, start: int, end: int, mode: Mode) -> int:
        """UFFDIO_REGISTER. Returns the bit mask of ioctls that the range takes. Raises OSError as the kernel
        does: EBUSY (another userfaultfd has it), EINVAL (a kind of vma that it does not take, or nothing
        mapped), EPERM (a shared file mapping without write permission), ENOMEM."""
        arg = bytearray(struct.pack("<QQQQ", start, end - start, int(mode), 0))
        fcntl.ioctl(self.fd, _IOC_REGISTER, arg)
        ioctls: int = struct.unpack("<QQQQ", arg)[3]
        return ioctls

    def unregister(self, start: int, end: int) -> None:
        """UFFDIO_UNREGISTER: faults of the range are the kernel's business again; waiters wake."""
        fcntl.ioctl(self.fd, _IOC_UNREGISTER, struct.pack("<QQ", start, end - start))

    def writeprotect(self, start: int, end: int, *, protect: bool, wake: bool = True) -> None:
        """UFFDIO_WRITEPROTECT, over EAGAIN (the target is in fork or mremap). Raises TargetGoneError where
        the address space is gone; OSError ENOENT where the range is not registered for WP."""
        mode = WP_PROTECT if protect else (0 if wake else WP_DONTWAKE)
        arg = struct.pack("<QQQ", start, end - start, mode)
        while True:
            try:
                fcntl.ioctl(self.fd, _IOC_WRITEPROTECT, arg)
                return
            except OSError as exc:
                if exc.errno == errno.ESRCH:
                    raise TargetGoneError("the address space is gone") from None
                if exc.errno != errno.EAGAIN:
                    raise

    def wake(self, start: int, end: int) -> None:
        """UFFDIO_WAKE: threads that wait for a fault in the range try again."""
        fcntl.ioctl(self.fd, _IOC_WAKE, struct.pack("<QQ", start, end - start))

    def copy(self, dst: int, src: int, length: int, mode: int = 0) -> int:
        """UFFDIO_COPY: fill missing pages from this process's memory at src. Returns bytes done; negative
        errno of the first failure where nothing was done (-EEXIST: somebody was faster)."""
        return self._filling(_IOC_COPY, struct.pack("<QQQQq", dst, src, length, mode, 0), 32)

    def zeropage(self, dst: int, length: int, mode: int = 0) -> int:
        """UFFDIO_ZEROPAGE: map zero pages. Result as `copy`."""
        return self._filling(_IOC_ZEROPAGE, struct.pack("<QQQq", dst, length, mode, 0), 24)

    def cont(self, dst: int, length: int, mode: int = 0) -> int:
        """UFFDIO_CONTINUE: map what is in the page cache already (minor mode). Result as `copy`."""
        return self._filling(_IOC_CONTINUE, struct.pack("<QQQq", dst, length, mode, 0), 24)

    def _filling(self, request: int, arg: bytes, result_at: int) -> int:
        buffer = bytearray(arg)
        done: int
        try:
            fcntl.ioctl(self.fd, request, buffer)
        except OSError as exc:
            (done,) = struct.unpack_from("<q", buffer, result_at)
            if exc.errno == errno.ESRCH:
                raise TargetGoneError("the address space is gone") from None
            return done if done > 0 else -(exc.errno or errno.EIO)
        (done,) = struct.unpack_from("<q", buffer, result_at)
        return done

    def mm_alive(self) -> bool:
        """Whether the address space still exists (it ends by exit and by exec): WRITEPROTECT of a page that
        is hardly ever mapped says ESRCH when it is gone, ENOENT while it is there (userfaultfd_writeprotect;
        were that page mapped and registered, it would only read as written once more)."""
        page = 0x10000  # the default vm.mmap_min_addr; EINVAL below it
        try:
            fcntl.ioctl(self.fd, _IOC_WRITEPROTECT, struct.pack("<QQQ", page, 4096, WP_DONTWAKE))
        except OSError as exc:
            return exc.errno != errno.ESRCH
        return True

    def read(self, count: int = 16) -> list[Message]:
        """Events that wait, at most `count`; [] when there are none (the descriptor does not block)."""
        try:
            data = os.read(self.fd, MSG_SIZE * count)
        except BlockingIOError:
            return []
        return [Message.parse(data[i : i + MSG_SIZE]) for i in range(0, len(data), MSG_SIZE)]

    def close(self) -> None:
        """Close the descriptor. Twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def available() -> Feature:
    """The features of this kernel's userfaultfd, by trying; Feature(0) where there is none."""
    fd = _libc().syscall(NR_USERFAULTFD, os.O_CLOEXEC | USER_MODE_ONLY)
    if fd < 0:
        return Feature(0)
    with Userfault(fd) as uffd:
        return uffd.handshake(Feature(0))


def refused(number: int) -> CapabilityMissingError:
    """Why userfaultfd(2) failed, as an error for people."""
    if number == errno.ENOSYS:
        return CapabilityMissingError(
            "this kernel has no userfaultfd", capability="userfaultfd", fix="CONFIG_USERFAULTFD=y"
        )
    if number == errno.EPERM:
        return CapabilityMissingError(
            "userfaultfd is refused (a container's seccomp profile, or privilege)",
            capability="userfaultfd",
            fix="run with CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1",
        )
    return CapabilityMissingError(f"userfaultfd failed: {os.strerror(number)}", capability="userfaultfd")


def _libc() -> ctypes.CDLL:
    lib = ctypes.CDLL(None, use_errno=True)
    lib.syscall.restype = ctypes.c_long
    return lib
