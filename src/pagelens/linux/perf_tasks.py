"""Faults of chosen tasks by inherited perf events: the way down where BPF cannot be had.

Works for own processes at perf_event_paranoid 2, then without faults taken in kernel mode: perf refuses them,
and the kernel's counter is the only witness of how many there were. native/perf translates to the records of the
BPF recorder and hands them to the same drain.

Rejected: system-wide events (need privilege), one ring a task (thousands of mappings), PERF_RECORD_READ as the
counter (it counts the event, not min_flt).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pagelens.linux.drain import Drain
from pagelens.linux.native import library
from pagelens.linux.procfs import TaskStat
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from pagelens.vm.units import PAGE_SIZE

_KERNEL = 1
_STACKS = 2
_CALLS = 4
_FORK, _EXIT, _COMM, _COMM_EXEC = 7, 4, 3, 1 << 13  # PERF_RECORD_*, PERF_RECORD_MISC_COMM_EXEC
_SYSCALL, _LATENCY, _FILE = 2, 8, 128  # PL_SYSCALL, PL_F_LATENCY, PL_F_FILE
LARGE_RING = 8 << 20  # enough for a busy drain
DEFAULT_RING = 128 * PAGE_SIZE  # what kernel.perf_event_mlock_kb lets an ordinary user map


class PerfTotals(ctypes.Structure):
    """struct pl_perf_totals of native/perf/perf.h. tasks_uncounted: gone without counters (no exit stop)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("recorded", "lost", "lost_records", "min_flt", "maj_flt"),
            *("tasks_started", "tasks_gone", "tasks_uncounted", "recorded_uncounted", "gup"),
        )
    )
    recorded: int
    lost: int
    lost_records: int
    min_flt: int
    maj_flt: int
    tasks_started: int
    tasks_gone: int
    tasks_uncounted: int
    recorded_uncounted: int
    gup: int


class CallRecord(ctypes.Structure):
    """struct pl_rec_call of native/bpf/record.h."""

    _fields_ = (
        *((name, ctypes.c_uint8) for name in ("kind", "flags", "nframes", "ntext")),
        ("nr", ctypes.c_int16),
        ("cpu", ctypes.c_uint16),
        *((name, ctypes.c_uint32) for name in ("pid", "tid", "mm", "extra")),
        *((name, ctypes.c_uint64) for name in ("time_ns", "latency_ns", "ip")),
        ("result", ctypes.c_int64),
        ("args", ctypes.c_uint64 * 6),
        ("dev", ctypes.c_uint64),
        ("ino", ctypes.c_uint64),
    )


@functools.cache
def _core() -> ctypes.CDLL:
    lib = library()
    handle, number = ctypes.c_void_p, ctypes.c_int
    lib.pl_perf_new.restype = handle
    lib.pl_perf_new.argtypes = [number, number, handle, ctypes.c_uint]
    lib.pl_perf_add.argtypes = [handle, number, number, number]
    lib.pl_perf_start.argtypes = [handle]
    lib.pl_perf_mm.argtypes = [handle, ctypes.c_uint32]
    lib.pl_perf_mm.restype = ctypes.c_uint32
    lib.pl_perf_counters.argtypes = [handle, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64]
    lib.pl_perf_totals.argtypes = [handle, handle]
    lib.pl_perf_call.argtypes = [handle, handle, ctypes.c_char_p]
    lib.pl_perf_call.restype = None
    lib.pl_perf_root.argtypes = [handle, ctypes.c_uint32]
    lib.pl_perf_root.restype = None
    lib.pl_perf_tell.argtypes = [handle, ctypes.c_char_p]
    lib.pl_perf_tell.restype = None
    lib.pl_perf_followed.argtypes = [handle, ctypes.c_uint32]
    lib.pl_perf_recorded.restype = ctypes.c_uint64
    lib.pl_perf_recorded.argtypes = [handle, ctypes.c_uint32]
    for name in ("stop", "free", "sync", "counters", "totals"):
        getattr(lib, f"pl_perf_{name}").restype = None
    for name in ("stop", "free", "sync"):
        getattr(lib, f"pl_perf_{name}").argtypes = [handle]
    return lib


def kernel_faults_visible() -> bool:
    """Whether faults taken in kernel mode may be recorded (CAP_PERFMON, or perf_event_paranoid < 2). Tried."""
    return _works(kernel=True)


def faults_visible() -> bool:
    """Whether perf may be used at all, for processes of ours (containers often forbid it). Tried."""
    return _works(kernel=False)


def most_ring() -> int:
    """Bytes of a ring that may be mapped here. Beyond kernel.perf_event_mlock_kb perf_mmap asks for CAP_IPC_LOCK, which
    a container with CAP_PERFMON has not. Tried."""
    return LARGE_RING if _works(kernel=False, ring_bytes=LARGE_RING) else DEFAULT_RING


def _works(*, kernel: bool, ring_bytes: int = PAGE_SIZE) -> bool:
    try:
        with PerfTasks(None, kernel=kernel, ring_bytes=ring_bytes) as perf:
            perf.add(os.getpid(), os.getpid(), on_exec=True)
    except CapabilityMissingError:
        return False
    return True


def _now() -> bytes:
    return struct.pack("<Q", time.monotonic_ns())


class PerfTasks:
    """Records completed faults of tasks, and of all that they fork from then on, into a drain.

    kernel: kernel-mode faults too. stacks: user call chains by frame pointers. calls: they are told by `call`, so
    that what perf says of mappings is dropped. ring_bytes: for each CPU, a power
    of two times 4 KiB; without privilege kernel.perf_event_mlock_kb and RLIMIT_MEMLOCK limit it.
    """

    def __init__(
        self,
        drain: Drain | None,
        *,
        kernel: bool,
        stacks: bool = False,
        calls: bool = False,
        ring_bytes: int = DEFAULT_RING,
    ) -> None:
        pages = max(1, ring_bytes // PAGE_SIZE)
        if pages & (pages - 1):
            raise ValueError(f"ring_bytes must be a power of two times {PAGE_SIZE}, not {ring_bytes}")
        flags = (_KERNEL if kernel else 0) | (_STACKS if stacks else 0) | (_CALLS if calls else 0)
        cpus = os.sysconf("SC_NPROCESSORS_CONF")
        self._handle: int | None = _core().pl_perf_new(cpus, pages, drain.handle if drain else None, flags)
        if not self._handle:
            raise MemoryError("perf rings")

    def add(self, pid: int, tid: int, *, on_exec: bool = False) -> None:
        """Follow one thread of process `pid` from now on, or from its next exec.

        Raises TargetGoneError, or CapabilityMissingError where perf refuses.
        """
        error = -_core().pl_perf_add(self._handle, pid, tid, int(on_exec))
        if error == errno.ESRCH:
            raise TargetGoneError(f"task {tid} is gone")
        if error in (errno.EACCES, errno.EPERM) and _foreign(pid):
            raise CapabilityMissingError(
                f"process {pid} may not be watched: it is another user's, or has more rights than we (setuid)",
                capability="other-users",
                fix=f"sudo pagelens attach {pid}",
            )
        if error in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSYS):
            raise CapabilityMissingError(
                f"perf may not watch task {tid} ({os.strerror(error)})",
                capability="perf-own",
                fix="sudo sysctl kernel.perf_event_paranoid=1, or run as root",
            )
        if error == errno.EMFILE:
            raise CapabilityMissingError(
                "too many threads for the limit of open files", capability="perf-own", fix="ulimit -n 65536"
            )
        if error:
            raise CapabilityMissingError(
                f"perf could not watch task {tid}: {os.strerror(error)}",
                capability="perf-own",
                fix="a smaller --ring-size, or sudo sysctl kernel.perf_event_mlock_kb=4096",
            )

    def mm(self, pid: int) -> int:
        """The number of the address space of a process that is stopped now; 0: not recorded."""
        _core().pl_perf_sync(self._handle)
        return int(_core().pl_perf_mm(self._handle, pid))

    def followed(self, tid: int) -> bool:
        """Whether a thread inherited our events when it began (adding it would count its faults twice)."""
        return bool(_core().pl_perf_followed(self._handle, tid))

    def recorded(self, tid: int) -> int:
        """Faults recorded of a thread that is stopped now."""
        return int(_core().pl_perf_recorded(self._handle, tid))

    def call(
        self,
        pid: int,
        tid: int,
        number: int,
        *,
        times: tuple[int, int | None],
        ip: int,
        args: Sequence[int],
        result: int,
        gup: int,
        file: tuple[int, int] | None,
        text: str,
    ) -> None:
        """A system call of a thread that is stopped at its end. times: ns of entry and return, None where it never
        returns. file: (device as the kernel numbers it, inode); text: its name."""
        record = CallRecord(kind=_SYSCALL, nr=number, pid=pid, tid=tid, extra=gup, ip=ip, result=result)
        begun, ended = times
        record.flags = (_FILE if file else 0) | (_LATENCY if ended is not None else 0)
        record.time_ns, record.latency_ns = begun, (ended or begun) - begun
        record.args = tuple(args)
        record.dev, record.ino = file or (0, 0)
        _core().pl_perf_call(self._handle, ctypes.byref(record), os.fsencode(text))

    def root(self, pid: int) -> None:
        """Begin with a task that perf does not watch: a tracer tells its end, and what it starts."""
        _core().pl_perf_root(self._handle, pid)

    def started(self, pid: int, tid: int, parent: tuple[int, int]) -> None:
        """A task that was started by (pid, tid) `parent`, told by a tracer."""
        self._tell(_FORK, 0, struct.pack("<IIII", pid, parent[0], tid, parent[1]) + _now(), pid, tid)

    def ended(self, pid: int, tid: int) -> None:
        """The end of a task, told by a tracer at its exit stop, after `counters`."""
        self._tell(_EXIT, 0, struct.pack("<IIII", pid, 0, tid, 0) + _now(), pid, tid)

    def executed(self, pid: int, path: str) -> None:
        """An execve, told by a tracer at its stop."""
        name = os.fsencode(path)[:200] + b"\0"
        name += bytes(-len(name) % 8)
        self._tell(_COMM, _COMM_EXEC, struct.pack("<II", pid, pid) + name, pid, pid)

    def _tell(self, kind: int, misc: int, body: bytes, pid: int, tid: int) -> None:
        trailer = struct.pack("<II", pid, tid) + _now() + struct.pack("<IIQ", 0, 0, 0)
        header = struct.pack("<IHH", kind, misc, 8 + len(body) + len(trailer))
        _core().pl_perf_tell(self._handle, header + body + trailer)

    def counters(self, tid: int, min_flt: int, maj_flt: int) -> None:
        """Tell the counters of a thread at its exit stop, without what came before the recording."""
        _core().pl_perf_counters(self._handle, tid, min_flt, maj_flt)

    def start(self) -> None:
        """Start the thread that takes from the rings."""
        error = -_core().pl_perf_start(self._handle)
        if error:
            raise OSError(error, os.strerror(error))

    def stop(self) -> None:
        """Stop recording; what is left in the rings is handed to the drain."""
        if self._handle:
            _core().pl_perf_stop(self._handle)

    def totals(self) -> PerfTotals:
        """Figures up to now."""
        totals = PerfTotals()
        _core().pl_perf_totals(self._handle, ctypes.byref(totals))
        return totals

    def close(self) -> None:
        """Free the rings and events. `stop` first."""
        if self._handle:
            _core().pl_perf_free(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle:
            self.stop()
        self.close()


def _foreign(pid: int) -> bool:
    # /proc/PID belongs to root where the process is not dumpable (proc(5)), as a setuid program is not.
    try:
        return Path(f"/proc/{pid}").stat().st_uid != os.geteuid()
    except OSError:
        return False


def fault_counters(pid: int, tid: int) -> tuple[int, int]:
    """(min_flt, maj_flt) of one thread (/proc/PID/task/TID/stat). TargetGoneError when it has gone."""
    return _counters(f"/proc/{pid}/task/{tid}/stat", tid)


def group_counters(pid: int) -> tuple[int, int]:
    """(min_flt, maj_flt) of a process, its ended threads included (/proc/PID/stat). TargetGoneError."""
    return _counters(f"/proc/{pid}/stat", pid)


def _counters(path: str, task: int) -> tuple[int, int]:
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"task {task} is gone") from None
    stat = TaskStat.parse(data)
    return stat.min_flt, stat.maj_flt
