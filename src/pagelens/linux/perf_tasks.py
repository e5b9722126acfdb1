"""Faults of chosen tasks by inherited perf events: the way down where BPF cannot be had.

Works for own processes at perf_event_paranoid 2, then without faults taken in kernel mode: perf refuses them, and
the kernel's counter is the only witness of how many there were. The C core drains (native/perfdrain.c) and writes
the same records as the BPF recorder.

Rejected: system-wide events (need privilege), one ring a task (thousands of mappings), PERF_RECORD_READ as the
counter (it counts the event, not min_flt).
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pagelens.linux.native import library
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from pagelens.vm.units import PAGE_SIZE

_KERNEL = 1
_STACKS = 2


@dataclass(frozen=True, slots=True)
class PerfTotals:
    """What one recording wrote. recorded, lost: faults; lost_records: records of any kind (PERF_RECORD_LOST);
    written: bytes; error: errno of a failed write to the spool, after which the rest was dropped."""

    recorded: int
    lost: int
    lost_records: int
    written: int
    error: int


def kernel_faults_visible() -> bool:
    """Whether faults taken in kernel mode may be recorded (CAP_PERFMON, or perf_event_paranoid < 2). Tried."""
    sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with PerfTasks(sink, kernel=True, ring_bytes=8 * PAGE_SIZE) as perf:
            perf.add(os.getpid())
        return True
    except CapabilityMissingError:
        return False
    finally:
        os.close(sink)


class PerfTasks:
    """Records completed faults of tasks and of all that they fork from then on.

    spool: a file descriptor that takes the records (native/bpf/record.h). kernel: kernel-mode faults too. stacks:
    user call chains by frame pointers. ring_bytes: for each CPU, a power of two times 4 KiB; without privilege
    the sum is limited by kernel.perf_event_mlock_kb and RLIMIT_MEMLOCK.
    """

    def __init__(
        self, spool: int, *, kernel: bool, stacks: bool = False, ring_bytes: int = 128 * PAGE_SIZE
    ) -> None:
        lib = library()
        lib.pl_perf_new.restype = ctypes.c_void_p
        handle = ctypes.c_void_p
        lib.pl_perf_add.argtypes = [handle, ctypes.c_int, ctypes.c_int]
        lib.pl_perf_start.argtypes = [handle]
        lib.pl_perf_stop.argtypes = [handle, ctypes.POINTER(ctypes.c_uint64 * 4)]
        lib.pl_perf_mm.argtypes = [handle, ctypes.c_uint32]
        lib.pl_perf_free.argtypes = [handle]
        cpus = os.sysconf("SC_NPROCESSORS_CONF")
        flags = (_KERNEL if kernel else 0) | (_STACKS if stacks else 0)
        pages = max(1, ring_bytes // PAGE_SIZE)
        if pages & (pages - 1):
            raise ValueError(f"ring_bytes must be a power of two times {PAGE_SIZE}, not {ring_bytes}")
        self._lib = lib
        self._handle: int | None = lib.pl_perf_new(cpus, pages, spool, flags)
        if not self._handle:
            raise MemoryError("perf rings")

    def add(self, tid: int, *, on_exec: bool = False) -> int:
        """Follow one task from now on, or from its next exec. Returns the number of its address space.

        Raises TargetGoneError, or CapabilityMissingError where perf refuses.
        """
        error = -self._lib.pl_perf_add(self._handle, tid, int(on_exec))
        if error == errno.ESRCH:
            raise TargetGoneError(f"process {tid} is gone")
        if error in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSYS):
            raise CapabilityMissingError(
                f"perf may not watch task {tid} ({os.strerror(error)})",
                capability="perf",
                fix="sysctl kernel.perf_event_paranoid=1, or run as root",
            )
        if error == errno.EMFILE:
            raise CapabilityMissingError(
                "too many threads for the limit of open files", capability="perf", fix="ulimit -n 65536"
            )
        if error:
            raise CapabilityMissingError(
                f"perf could not watch task {tid}: {os.strerror(error)}",
                capability="perf",
                fix="a smaller --ring-size, or sysctl kernel.perf_event_mlock_kb=4096",
            )
        return int(self._lib.pl_perf_mm(self._handle, tid))

    def start(self) -> None:
        """Start the drain thread. `add` before, not after."""
        error = -self._lib.pl_perf_start(self._handle)
        if error:
            raise OSError(error, os.strerror(error))

    def stop(self) -> PerfTotals:
        """Stop recording, drain what is left."""
        totals = (ctypes.c_uint64 * 4)()
        error = -self._lib.pl_perf_stop(self._handle, ctypes.byref(totals))
        recorded, lost, lost_records, written = (int(value) for value in totals)
        return PerfTotals(recorded, lost, lost_records, written, error)

    def close(self) -> None:
        """Free the rings and events. Call stop first if it was started."""
        if self._handle:
            self._lib.pl_perf_free(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
