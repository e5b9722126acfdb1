"""System calls that shape memory, seen by ptrace: what `run --calls ptrace` adds where BPF cannot be had.

Each call of each thread stops twice (PTRACE_SYSCALL), and Python looks: some 50 µs a call, so it is done on request
only. In return munmap, madvise, mremap and brk are known without privilege, and the faults that the kernel makes for a
call that touches no memory of the program otherwise (mlock, MAP_POPULATE, …) are measured as the counter's rise across
it. Rejected: a seccomp filter that stops at the wanted calls only (it outlives its tracer: after our death every such
call would fail with ENOSYS for ever); reading registers by number (PTRACE_GET_SYSCALL_INFO tells entry from exit, and
32-bit calls from others).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagelens.linux import ptrace
from pagelens.linux.memory import read_into
from pagelens.linux.perf_tasks import PerfTasks, fault_counters
from pagelens.linux.procfs import process_of
from pagelens.linux.syscalls import WANTED
from pagelens.vm.errors import PagelensError
from pagelens.vm.names import SYSCALL_NUMBERS
from pagelens.vm.units import ranges_text

_GET_SYSCALL_INFO = 0x420E  # Linux 5.3
_ENTRY, _EXIT = 1, 2
_X86_64 = 0xC000003E  # AUDIT_ARCH_X86_64
_MMAP, _IOCTL = SYSCALL_NUMBERS["mmap"], SYSCALL_NUMBERS["ioctl"]
_MAP_ANONYMOUS = 0x20
_OPEN, _CREAT, _OPENAT2, _O_TRUNC = (*(SYSCALL_NUMBERS[n] for n in ("open", "creat", "openat2")), os.O_TRUNC)
_OPENS = frozenset(SYSCALL_NUMBERS[n] for n in ("open", "openat", "creat", "openat2"))
_REACHES = frozenset(SYSCALL_NUMBERS[n] for n in ("process_vm_readv", "process_vm_writev"))
_VECTORS = 4  # of those, as native/bpf/record.h has it
_PAGEMAP_SCAN = 0x6610
_ENDINGS = frozenset(SYSCALL_NUMBERS[name] for name in ("exit", "exit_group"))
_LIMITS = frozenset({2, 3, 5, 8, 9})  # RLIMIT_DATA, STACK, RSS, MEMLOCK, AS
# Calls that read and write nothing of the program's memory: a rise of the counter across one is gup, all of it.
_TOUCH_NOTHING = frozenset(
    SYSCALL_NUMBERS[name]
    for name in ("mmap", "munmap", "mprotect", "pkey_mprotect", "madvise", "brk", "mremap", "mlock", "mlock2")
) | {SYSCALL_NUMBERS["mlockall"], SYSCALL_NUMBERS["munlock"], SYSCALL_NUMBERS["munlockall"]}
_FD_FIRST = frozenset(
    SYSCALL_NUMBERS[n] for n in ("ftruncate", "fallocate", "fsync", "fdatasync", "pwrite64")
)


class _Info(ctypes.Structure):
    # struct ptrace_syscall_info (include/uapi/linux/ptrace.h); words: entry's number and arguments, or exit's
    # result and whether it is an error.
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("words", ctypes.c_uint64 * 7),
    )


@dataclass(slots=True)
class _Open:
    number: int
    args: tuple[int, ...]
    ip: int
    begun: int
    counted: int  # min_flt + maj_flt less what was recorded; -1 where it is not asked


class CallRecorder:
    """Turns syscall stops into call records of a `PerfTasks`. gup: faults measured in all."""

    def __init__(self, perf: PerfTasks, *, kernel: bool) -> None:
        """kernel: kernel-mode faults are recorded, so that any call's rise can be told apart."""
        self._perf = perf
        self._kernel = kernel
        self._open: dict[int, _Open] = {}
        self._process: dict[int, int] = {}

    def stop(self, tid: int) -> None:
        """A thread is at the entry or the exit of a system call. Whatever fails here is not the program's harm."""
        with contextlib.suppress(PagelensError, OSError):
            self._stop(tid)

    def gone(self, tid: int) -> None:
        """A thread has ended."""
        self._open.pop(tid, None)
        self._process.pop(tid, None)

    def _stop(self, tid: int) -> None:
        info = _Info()
        ptrace.request(_GET_SYSCALL_INFO, tid, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == _ENTRY:
            self._enter(tid, info)
        elif info.op == _EXIT:
            call = self._open.pop(tid, None)
            if call is not None:
                self._leave(tid, call, ctypes.c_int64(info.words[0]).value)

    def _enter(self, tid: int, info: _Info) -> None:
        number, args = int(info.words[0]), tuple(int(w) for w in info.words[1:7])
        if info.arch != _X86_64 or not _wanted(number, args):
            return
        if number in _ENDINGS:  # there will be no exit stop
            self._tell(tid, _Open(number, args, int(info.ip), time.monotonic_ns(), -1), None, 0)
            return
        counted = -1
        if self._kernel or number in _TOUCH_NOTHING:
            counted = self._unrecorded(tid)
        self._open[tid] = _Open(number, args, int(info.ip), time.monotonic_ns(), counted)

    def _leave(self, tid: int, call: _Open, result: int) -> None:
        gup = max(0, self._unrecorded(tid) - call.counted) if call.counted >= 0 else 0
        self._tell(tid, call, result, gup)

    def _tell(self, tid: int, call: _Open, result: int | None, gup: int) -> None:
        # result None: the call never returns.
        pid, args = self._process_of(tid), call.args
        if call.number == _IOCTL:
            args = (*args[:3], *_words(pid, args))
        file, name = _file(tid, call, result or 0)
        if call.number in _OPENS and file is None:
            return  # openat2 without O_TRUNC, or it failed
        if call.number in _REACHES:
            name = _vectors(pid, args)
        self._perf.call(
            pid,
            tid,
            call.number,
            times=(call.begun, time.monotonic_ns() if result is not None else None),
            ip=call.ip,
            args=args,
            result=result or 0,
            gup=gup,
            file=file,
            text=name,
        )

    def _unrecorded(self, tid: int) -> int:
        minor, major = fault_counters(self._process_of(tid), tid)
        return minor + major - self._perf.recorded(tid)

    def _process_of(self, tid: int) -> int:
        pid = self._process.get(tid)
        if pid is None:
            pid = self._process[tid] = process_of(tid)
        return pid


def _wanted(number: int, args: tuple[int, ...]) -> bool:
    # As wanted_call() of native/bpf/calls.h; other ioctls, prctls and limits change no memory.
    condition = WANTED.get(number, 0)
    if number == _IOCTL:
        return (args[1] >> 8) & 0xFF == 0xAA or args[1] & 0xFFFF == _PAGEMAP_SCAN
    if condition == 2:  # prctl: PR_SET_THP_DISABLE, PR_SET_MM, PR_SET_VMA, PR_SET_MDWE, PR_SET_MEMORY_MERGE
        return args[0] in (41, 35, 0x53564D41, 65, 67)
    if condition == 3:  # prlimit64: a new limit
        return args[2] != 0 and args[1] in _LIMITS
    if condition == 5:  # open and its like: with O_TRUNC
        return number in (_CREAT, _OPENAT2) or bool(args[1 if number == _OPEN else 2] & _O_TRUNC)
    return condition == 1


def _words(pid: int, args: tuple[int, ...]) -> tuple[int, int, int]:
    # The range stands in the structure that the third argument points to.
    words = np.zeros(3, np.uint64)
    read_into(pid, args[2] + (8 if args[1] & 0xFFFF == _PAGEMAP_SCAN else 0), words.view(np.uint8))
    return int(words[0]), int(words[1]), int(words[2])


def _vectors(pid: int, args: tuple[int, ...]) -> str:
    # The first ranges of the other process, as `capture.convert` writes them.
    words = np.zeros(2 * min(args[4], _VECTORS), np.uint64)
    if len(words):
        read_into(pid, args[3], words.view(np.uint8))
    return ranges_text(words.tolist())


def _empties(tid: int, call: _Open) -> bool:
    if call.number != _OPENAT2:
        return True  # as _wanted has found
    how = np.zeros(1, np.uint64)
    read_into(process_of(tid), call.args[2], how.view(np.uint8))
    return bool(int(how[0]) & _O_TRUNC)


def _file(tid: int, call: _Open, result: int) -> tuple[tuple[int, int] | None, str]:
    # ((device as the kernel numbers it, inode), name) of the file behind the call.
    if call.number == _MMAP and (call.args[3] & _MAP_ANONYMOUS or -4096 < result < 0):
        return None, ""
    fd = call.args[4] if call.number == _MMAP else result if call.number in _OPENS else call.args[0]
    if call.number != _MMAP and call.number not in _FD_FIRST | _OPENS:
        return None, ""
    if call.number in _OPENS and (result < 0 or not _empties(tid, call)):
        return None, ""
    path = Path(f"/proc/{tid}/fd/{ctypes.c_int32(fd & 0xFFFFFFFF).value}")
    try:
        status, name = path.stat(), str(path.readlink())
    except OSError:
        return None, ""
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    return (device, status.st_ino), name.removesuffix(" (deleted)")
