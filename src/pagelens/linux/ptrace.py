"""ptrace of one thread: seize, stop, registers, signals. `hold` builds "all threads of a process" on it.

Why PTRACE_SEIZE and not PTRACE_ATTACH: ATTACH sends a SIGSTOP that a tracer killed at the wrong moment
leaves behind, so the target would stay stopped. SEIZE without PTRACE_O_EXITKILL leaves nothing: when the
tracer dies, however it dies, the kernel detaches and the target goes on (exit_ptrace, kernel/ptrace.c). No
other option is ever set, so no child is traced automatically.

Rejected: python-ptrace and ptrace through gdb (a dependency, and milliseconds a stop); os.waitpid for stops,
because it also reaps the exit status of a target that is our own child, which belongs to whoever started it.
All requests about a thread must come from the OS thread that seized it (the kernel's rule).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time
from dataclasses import dataclass
from typing import NamedTuple

from pagelens.vm.errors import TargetGoneError

# include/uapi/linux/ptrace.h
PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_GETSIGINFO = 0x4202
PTRACE_SETSIGINFO = 0x4203
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_LISTEN = 0x4208
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_EVENT_STOP = 128

# include/uapi/linux/elf.h
NT_PRSTATUS = 1
NT_PRFPREG = 2
NT_X86_XSTATE = 0x202

WALL = 0x40000000  # __WALL: wait for threads too
SIGINFO_SIZE = 128
SIGTRAP = 5
STOP_SIGNALS = frozenset(
    (19, 20, 21, 22)
)  # SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU: a group stop shows one of these
SIGSET_SIZE = 8

# System-call results that mean "restart me" (include/linux/errno.h); they show in rax of a thread that was
# interrupted inside a call.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516

libc = ctypes.CDLL(None, use_errno=True)
_ptrace = libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

REG_NAMES: tuple[str, ...] = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip


_WORDS = struct.Struct(f"={len(REG_NAMES)}Q")


class UserRegs(ctypes.Structure):
    """struct user_regs_struct of x86-64 (NT_PRSTATUS), 27 words; fs_base and gs_base are the TLS bases."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int
    _fields_ = [(_name, ctypes.c_uint64) for _name in REG_NAMES]

    def as_dict(self) -> dict[str, int]:
        """Register name -> value."""
        return dict(zip(REG_NAMES, _WORDS.unpack(self), strict=True))

    @classmethod
    def from_dict(cls, values: dict[str, int]) -> UserRegs:
        """The inverse of as_dict. KeyError for a missing register."""
        regs = cls()
        for name in REG_NAMES:
            setattr(regs, name, values[name])
        return regs

    def copy(self) -> UserRegs:
        """An independent copy."""
        return UserRegs.from_buffer_copy(self)

    @property
    def in_syscall(self) -> bool:
        """Whether the thread was stopped inside a system call (orig_rax holds its number)."""
        return ctypes.c_int64(self.orig_rax).value >= 0

    @property
    def result(self) -> int:
        """rax, signed: -errno, or one of -ERESTART* for a call that would be restarted."""
        return int(ctypes.c_int64(self.rax).value)


class RseqConfig(NamedTuple):
    """PTRACE_GET_RSEQ_CONFIGURATION (5.13): where the thread registered rseq; 0 if not."""

    pointer: int
    size: int
    signature: int
    flags: int


class _Rseq(ctypes.Structure):
    _fields_ = [
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class _PeekArgs(ctypes.Structure):
    _fields_ = [
        ("off", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("nr", ctypes.c_int32),
    ]


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a thread is in a ptrace stop: the signal, and the PTRACE_EVENT number (0: a signal on its way)."""

    signal: int
    event: int

    @property
    def is_signal_delivery(self) -> bool:
        """A signal was about to be delivered; it must be passed on, or it is lost."""
        return self.event == 0

    @property
    def is_group_stop(self) -> bool:
        """Stopped by job control: it must stay so when we go."""
        return self.event == PTRACE_EVENT_STOP and self.signal in STOP_SIGNALS


def request(number: int, tid: int, addr: int = 0, data: int = 0) -> int:
    """One ptrace request. OSError with its errno; ESRCH (gone, not stopped) becomes TargetGoneError."""
    result = int(_ptrace(number, tid, addr, data))
    if result == -1:
        code = ctypes.get_errno()
        if code == errno.ESRCH:
            raise TargetGoneError(f"thread {tid} is gone (or was killed while it was held)")
        raise OSError(code, os.strerror(code), f"ptrace request {number:#x} on {tid}")
    return result


class Tracee:
    """One seized thread.

    Requests other than `interrupt` need it in a ptrace stop. `pending` holds the siginfo of signals that were
    taken off the queue while we held the thread and are not passed on yet, oldest first.
    """

    __slots__ = ("_xstate_size", "pending", "stop", "tid")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.stop: Stop | None = None
        self.pending: list[bytes] = []
        self._xstate_size = 0

    @classmethod
    def seize(cls, tid: int) -> Tracee:
        """PTRACE_SEIZE without options; the thread keeps running. OSError EPERM, TargetGoneError."""
        request(PTRACE_SEIZE, tid)
        return cls(tid)

    def interrupt(self) -> None:
        """Ask for a stop; `wait` collects it."""
        request(PTRACE_INTERRUPT, self.tid)

    def poll(self) -> Stop | None:
        """The stop that the thread reached, or None while it runs. TargetGoneError if it exited."""
        try:
            # Look without taking: an exit status may belong to a real parent. A stop is reported to its
            # tracer whatever the options (wait_task_stopped), so only si_code tells which it is.
            info = os.waitid(os.P_PID, self.tid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)
            if info is None:
                return None
            if info.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                raise TargetGoneError(f"thread {self.tid} exited")
            info = os.waitid(os.P_PID, self.tid, os.WSTOPPED | os.WNOHANG | WALL)
        except ChildProcessError:
            raise TargetGoneError(f"thread {self.tid} is gone") from None
        if info is None:
            return None  # killed between the two looks
        status = info.si_status
        self.stop = Stop(status & 0x7F, status >> 8)
        if self.stop.is_signal_delivery:
            self.pending.append(self.siginfo())
        return self.stop

    def wait(self, deadline: float) -> Stop | None:
        """The next stop, or None when time.monotonic() passes `deadline`. TargetGoneError if it exited.

        Spins briefly (a stop takes microseconds), then sleeps in steps that grow to 2 ms.
        """
        pause = 0.0
        spins = 0
        while True:
            stop = self.poll()
            if stop is not None:
                return stop
            if time.monotonic() > deadline:
                return None
            spins += 1
            if spins > 20:
                pause = min(pause + 0.00005, 0.002)
                time.sleep(pause)
            else:
                os.sched_yield()

    def cont(self, signal: int = 0, how: int = PTRACE_CONT) -> None:
        """Let it run (PTRACE_CONT, or PTRACE_SYSCALL by `how`), delivering `signal` from a signal stop."""
        request(how, self.tid, 0, signal)
        self.stop = None

    def listen(self) -> None:
        """Let a job-control-stopped thread stay stopped, yet wake on SIGCONT (PTRACE_LISTEN)."""
        request(PTRACE_LISTEN, self.tid)
        self.stop = None

    def detach(self, signal: int = 0) -> None:
        """Let go; a thread of a job-control-stopped process stays stopped (the kernel sees to it)."""
        request(PTRACE_DETACH, self.tid, 0, signal)
        self.stop = None

    def regset(self, kind: int, size: int) -> bytes:
        """A register set, at most `size` bytes; shorter where the kernel's is."""
        buffer = ctypes.create_string_buffer(size)
        iov = _Iovec(ctypes.addressof(buffer), size)
        request(PTRACE_GETREGSET, self.tid, kind, ctypes.addressof(iov))
        return buffer.raw[: iov.len]

    def set_regset(self, kind: int, data: bytes) -> None:
        """Write a register set as `regset` gave it."""
        buffer = ctypes.create_string_buffer(data, len(data))
        iov = _Iovec(ctypes.addressof(buffer), len(data))
        request(PTRACE_SETREGSET, self.tid, kind, ctypes.addressof(iov))

    def regs(self) -> UserRegs:
        """General registers, segment bases and orig_rax. ValueError for a thread in 32-bit mode."""
        regs = UserRegs()
        iov = _Iovec(ctypes.addressof(regs), ctypes.sizeof(regs))
        request(PTRACE_GETREGSET, self.tid, NT_PRSTATUS, ctypes.addressof(iov))
        if iov.len != ctypes.sizeof(regs):
            raise ValueError(f"thread {self.tid} runs 32-bit code")
        return regs

    def set_regs(self, regs: UserRegs) -> None:
        """Write the general registers.

        With orig_rax >= 0 and rax = -ERESTART* the kernel restarts that call on resume; orig_rax = -1
        forbids it.
        """
        iov = _Iovec(ctypes.addressof(regs), ctypes.sizeof(regs))
        request(PTRACE_SETREGSET, self.tid, NT_PRSTATUS, ctypes.addressof(iov))

    def fpregs(self) -> bytes:
        """struct user_fpregs_struct (FXSAVE layout), 512 bytes."""
        return self.regset(NT_PRFPREG, 512)

    def xstate(self) -> bytes:
        """The XSAVE area in standard form; its length depends on the CPU and on what the thread may use."""
        if not self._xstate_size:
            self._xstate_size = 16384  # AMX tiles alone are 8 KiB
        data = self.regset(NT_X86_XSTATE, self._xstate_size)
        self._xstate_size = len(data)
        return data

    def sigmask(self) -> int:
        """Blocked signals, bit N-1 for signal N."""
        mask = ctypes.c_uint64()
        request(PTRACE_GETSIGMASK, self.tid, SIGSET_SIZE, ctypes.addressof(mask))
        return int(mask.value)

    def set_sigmask(self, mask: int) -> None:
        """Set the blocked signals."""
        value = ctypes.c_uint64(mask)
        request(PTRACE_SETSIGMASK, self.tid, SIGSET_SIZE, ctypes.addressof(value))

    def siginfo(self) -> bytes:
        """siginfo_t of the stop (128 bytes)."""
        buffer = ctypes.create_string_buffer(SIGINFO_SIZE)
        request(PTRACE_GETSIGINFO, self.tid, 0, ctypes.addressof(buffer))
        return buffer.raw

    def set_siginfo(self, info: bytes) -> None:
        """Replace the siginfo of the signal that is about to be delivered."""
        buffer = ctypes.create_string_buffer(info, SIGINFO_SIZE)
        request(PTRACE_SETSIGINFO, self.tid, 0, ctypes.addressof(buffer))

    def queued_signals(self, *, shared: bool) -> list[bytes]:
        """siginfo of signals that wait in the queue (of the process with `shared`), without taking them."""
        out: list[bytes] = []
        while True:
            args = _PeekArgs(len(out), 1 if shared else 0, 16)
            buffer = ctypes.create_string_buffer(SIGINFO_SIZE * 16)
            got = request(PTRACE_PEEKSIGINFO, self.tid, ctypes.addressof(args), ctypes.addressof(buffer))
            out += [buffer.raw[i * SIGINFO_SIZE : (i + 1) * SIGINFO_SIZE] for i in range(got)]
            if got < 16:
                return out

    def rseq(self) -> RseqConfig | None:
        """Where rseq is registered; None where the kernel cannot tell (before 5.13)."""
        conf = _Rseq()
        try:
            request(PTRACE_GET_RSEQ_CONFIGURATION, self.tid, ctypes.sizeof(conf), ctypes.addressof(conf))
        except OSError:
            return None
        return RseqConfig(conf.pointer, conf.size, conf.signature, conf.flags)


def siginfo_signal(info: bytes) -> int:
    """si_signo of a raw siginfo_t."""
    return int.from_bytes(info[:4], "little", signed=True)
