"""perf software events of page faults, one per CPU for all processes.

PERF_COUNT_SW_PAGE_FAULTS_MIN and _MAJ with period 1 fire when a fault is done (mm_account_fault in
mm/memory.c); PERF_COUNT_SW_PAGE_FAULTS fires before handling and counts failed ones too, so it is not used.
Per CPU and not inherited: an inherited event makes every new thread pay (perf_event_open(2)).
"""

from __future__ import annotations

import ctypes
import errno
import os

from pagelens.vm.errors import CapabilityMissingError

SYS_PERF_EVENT_OPEN = 298  # x86-64
TYPE_SOFTWARE = 1
PAGE_FAULTS_MIN = 5
PAGE_FAULTS_MAJ = 6
FLAG_FD_CLOEXEC = 8
_DISABLED = 1 << 0


class EventAttr(ctypes.Structure):
    """struct perf_event_attr up to PERF_ATTR_SIZE_VER5 (112 bytes)."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("wakeup_events", ctypes.c_uint32),
        ("bp_type", ctypes.c_uint32),
        ("config1", ctypes.c_uint64),
        ("config2", ctypes.c_uint64),
        ("branch_sample_type", ctypes.c_uint64),
        ("sample_regs_user", ctypes.c_uint64),
        ("sample_stack_user", ctypes.c_uint32),
        ("clockid", ctypes.c_int32),
        ("sample_regs_intr", ctypes.c_uint64),
        ("aux_watermark", ctypes.c_uint32),
        ("sample_max_stack", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def event_open(attr: EventAttr, pid: int, cpu: int, group: int = -1) -> int:
    """perf_event_open(2), close-on-exec; returns the descriptor. OSError where the kernel refuses."""
    attr.size = ctypes.sizeof(EventAttr)
    fd = int(
        _libc.syscall(
            ctypes.c_long(SYS_PERF_EVENT_OPEN),
            ctypes.byref(attr),
            ctypes.c_int(pid),
            ctypes.c_int(cpu),
            ctypes.c_int(group),
            ctypes.c_ulong(FLAG_FD_CLOEXEC),
        )
    )
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def open_fault_event(config: int, cpu: int) -> int:
    """All completed minor (PAGE_FAULTS_MIN) or major faults on one CPU, disabled until a program is attached.

    CapabilityMissingError without CAP_PERFMON.
    """
    attr = EventAttr(type=TYPE_SOFTWARE, config=config, sample_period=1, flags=_DISABLED)
    try:
        return event_open(attr, -1, cpu)
    except OSError as error:
        fix = "run as root" if error.errno in (errno.EACCES, errno.EPERM) else ""
        raise CapabilityMissingError(
            f"page-fault events of all processes cannot be opened: {error.strerror}",
            capability="perf-system-wide",
            fix=fix,
        ) from None


def parse_cpu_list(text: str) -> list[int]:
    """CPU numbers of a list such as "0-3,8"."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def online_cpus() -> list[int]:
    """Numbers of the CPUs that are online."""
    with open("/sys/devices/system/cpu/online") as stream:
        return parse_cpu_list(stream.read())
