"""System calls made by another process, by ptrace, such that our death at any moment does it no harm.

native/inject.c does the work in one stop of one thread (about 0.1 ms) and says why it is safe: the thread's
state lies on its own stack as a signal frame, it executes only code that it already has, and if the tracer
dies the frame's return restores it. This module chooses: the code to use, the thread, and whom to refuse.

What can remain if we are killed in that window: the call may have been made (a userfaultfd without any
registered range, close-on-exec), and a call that was interrupted with a timeout starts its timeout anew.

Refused, each with its reason: targets that somebody traces already, that are confined by seccomp (the filter
might kill them for our call), 32-bit, with a shadow stack, frozen, or whose threads all stand on stacks that
may be a coroutine's. Rejected: a thread's own ptrace from Python (the target stays stopped while another
Python thread holds the interpreter).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pagelens.linux import maps
from pagelens.linux.gadgets import Gadgets, NoCodeError, find_gadgets
from pagelens.linux.native import library
from pagelens.linux.procfs import Process
from pagelens.linux.userfault import NR_USERFAULTFD, USER_MODE_ONLY, Userfault, refused
from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError
from pagelens.vm.vma import Prot, VmaList

NR_CLOSE = 3
# Stages of native/inject.h, for the tests that kill the tracer at each of them.
STAGES = ("seized", "stopped", "frame", "regs", "mask", "entry", "exit", "taken", "unmask", "back")


class _Call(ctypes.Structure):
    _fields_ = (
        ("nr", ctypes.c_int64),
        ("args", ctypes.c_uint64 * 6),
        ("ret", ctypes.c_int64),
        ("done", ctypes.c_int32),
        ("take_fd", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("fd_errno", ctypes.c_int32),
        ("arg0_from", ctypes.c_int32),
        ("pad", ctypes.c_int32),
    )


class _StackVma(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("main_stack", ctypes.c_int64))


class _Request(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_int32),
        ("tid", ctypes.c_int32),
        ("pidfd", ctypes.c_int32),
        ("n_vmas", ctypes.c_int32),
        ("gadget", ctypes.c_uint64),
        ("sigreturn", ctypes.c_uint64),
        ("pop_rax", ctypes.c_uint64),
        ("vmas", ctypes.POINTER(_StackVma)),
        ("calls", ctypes.POINTER(_Call)),
        ("deadline_ns", ctypes.c_int64),
        ("held_ns", ctypes.c_int64),
        ("n_calls", ctypes.c_int32),
        ("die_at", ctypes.c_int32),
        ("stage", ctypes.c_int32),
        ("refused", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("restarted", ctypes.c_int32),
    )


_SEIZE, _NO_STOP, _GONE, _BITS32, _RSEQ, _STACK, _FRAME, _CALL, _IMAGE = range(1, 10)


@dataclass(slots=True)
class Call:
    """One system call for the target. nr, args: as syscall(2). take_fd: bring the descriptor it returns into
    this process. arg0_from: index of an earlier call whose result becomes args[0] (this one is skipped where
    that one failed). After the call: result (as the kernel returns it, -errno on failure; None: not made) and
    fd (ours, or -1)."""

    nr: int
    args: tuple[int, ...] = ()
    take_fd: bool = False
    arg0_from: int | None = None
    result: int | None = field(default=None, init=False)
    fd: int = field(default=-1, init=False)


@dataclass(frozen=True, slots=True)
class Held:
    """What a remote call cost: thread used, nanoseconds that it was held, and whether a call that ends with
    EINTR at any stop was started again on its behalf."""

    tid: int
    held_ns: int
    restarted: bool


def remote_calls(
    proc: Process, calls: Sequence[Call], *, traced: bool = False, tid: int = 0, die_at: str = ""
) -> Held:
    """Let one thread of the process make `calls`, in order; fills in their results.

    With `traced`, the calling thread traces thread `tid` (0: the process's leader) already and it is in a
    ptrace stop; it stays so. die_at: kill this process at that stage (for tests). Raises CapabilityMissingError
    where the target cannot be asked (see the module), TargetGoneError where it is gone.
    """
    if not traced:
        refuse_unfit(proc)
    pidfd = _files_of(proc)
    try:
        return _on_some_thread(proc, calls, pidfd, (tid or proc.pid) if traced else 0, die_at)
    finally:
        os.close(pidfd)


def _files_of(proc: Process) -> int:
    # A pidfd through which pidfd_getfd(2) sees the process's descriptors: a leader that has ended has none.
    if proc.mm_tid == proc.pid:
        return proc.pidfd()
    try:
        return os.pidfd_open(proc.mm_tid, os.O_EXCL)  # PIDFD_THREAD, Linux 6.9
    except ProcessLookupError:
        raise TargetGoneError(f"process {proc.pid} is gone") from None
    except OSError:
        raise CapabilityMissingError(
            f"the leader of process {proc.pid} has ended while its threads go on: this kernel gives out no"
            " descriptors of a thread alone",
            capability="ptrace",
            fix="boot Linux 6.9 or later, or use --backend soft-dirty",
        ) from None


def take_userfaultfd(proc: Process, *, traced: bool = False, die_at: str = "") -> tuple[Userfault, Held]:
    """A userfaultfd of the other process's address space, held by us alone: made there, taken here
    (pidfd_getfd), closed there. No handshake has been made: until then it can do nothing."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
    make = Call(NR_USERFAULTFD, (flags,), take_fd=True)
    shut = Call(NR_CLOSE, (0,), arg0_from=0)
    held = remote_calls(proc, [make, shut], traced=traced, die_at=die_at)
    if make.result is not None and make.result >= 0 and shut.result is None:
        remote_calls(
            proc, [Call(NR_CLOSE, (make.result,))], traced=traced
        )  # the thread was killed in between
    if make.fd < 0:
        if make.result is not None and make.result < 0:
            raise refused(-make.result)
        raise CapabilityMissingError(
            f"cannot take the userfaultfd out of process {proc.pid} (pidfd_getfd needs ptrace rights)",
            capability="other-users",
            fix="run pagelens as root (sudo)",
        )
    return Userfault(make.fd), held


def refuse_unfit(proc: Process) -> None:
    """Raises, with one sentence, for a target that must not be asked to make a system call."""
    status = dict(
        line.split(":\t", 1)
        for line in proc.read("status").decode(errors="replace").splitlines()
        if ":\t" in line
    )
    name = f"{proc.pid} ({status.get('Name', '?')})"
    tracer = int(status.get("TracerPid", "0"))
    if tracer:
        raise CapabilityMissingError(
            f"process {name} is traced by {tracer} already, and a process has one tracer at most",
            capability="ptrace",
            fix=f"detach it, or end process {tracer}",
        )
    if status.get("Seccomp", "0").strip() != "0":
        raise CapabilityMissingError(
            f"process {name} is confined by seccomp: its filter might kill it for the call that this needs",
            capability="ptrace",
            fix="track it from inside (pagelens.track()), or start it without the filter",
        )
    if "shstk" in status.get("x86_Thread_features", ""):
        raise CapabilityMissingError(
            f"process {name} runs with a shadow stack, which a remote call would violate",
            capability="ptrace",
            fix="start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        )
    if _frozen(proc):
        raise CapabilityMissingError(
            f"process {name} is frozen by its cgroup and cannot run a call",
            capability="ptrace",
            fix="thaw it",
        )
    if _is_32bit(proc):
        raise CapabilityMissingError(f"process {name} is 32-bit; only 64-bit processes can be tracked")


def _is_32bit(proc: Process) -> bool:
    try:
        fd = proc.fd("exe")
    except (CapabilityMissingError, TargetGoneError):
        return False
    try:
        head = os.pread(fd, 20, 0)
    finally:
        os.close(fd)
    # ELFCLASS32 also holds for x32 programs: their pointers do not fit our frame's promises either.
    return head[:4] == b"\x7fELF" and head[4] == 1


def _frozen(proc: Process) -> bool:
    for line in proc.read("cgroup").decode(errors="replace").splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "freezer":
            roots, want = ["freezer"], ("freezer.state", "FROZEN")
        elif number == "0" and not controllers:
            roots, want = (
                ["", "unified"],
                ("cgroup.events", "frozen 1"),
            )
        else:
            continue
        for root in roots:
            try:
                text = (Path("/sys/fs/cgroup") / root / path.lstrip("/") / want[0]).read_text()
            except OSError:
                continue
            if want[1] in text:
                return True
    return False


def _candidates(proc: Process) -> list[int]:
    # The leader first (it stands on [stack] in almost every program), then sleeping threads, then running.
    order: list[tuple[int, int]] = []
    for tid in proc.tasks():
        try:
            state = proc.stat(tid).state
        except TargetGoneError:
            continue
        if state in "ZXD":
            continue
        order.append((0 if tid == proc.pid else 1 if state == "S" else 2, tid))
    return [tid for _, tid in sorted(order)[:12]]


def _on_some_thread(
    proc: Process,
    calls: Sequence[Call],
    pidfd: int,
    traced: int,  # the thread to use, which this one traces; 0: any, to be seized
    die_at: str,
) -> Held:
    native = (_Call * len(calls))()
    vmas, execs, since = maps.read(proc), 0, time.monotonic()
    gadgets, stacks, table = _looked_up(proc, vmas, last_try=bool(traced))
    lib = library()
    last: _Request | None = None
    give_up = time.monotonic() + 2.0
    while True:
        for tid in [traced] if traced else _candidates(proc) if gadgets.syscall_ret else []:
            for slot, call in zip(native, calls, strict=True):
                slot.nr, slot.ret, slot.done, slot.fd = call.nr, 0, 0, -1
                slot.args = (ctypes.c_uint64 * 6)(*[a & (1 << 64) - 1 for a in call.args])
                slot.take_fd = int(call.take_fd)
                slot.arg0_from = -1 if call.arg0_from is None else call.arg0_from
            request = _Request(
                pid=proc.pid,
                tid=tid,
                pidfd=pidfd,
                n_vmas=stacks,
                gadget=gadgets.syscall_ret,
                sigreturn=gadgets.sigreturn,
                pop_rax=gadgets.pop_rax,
                vmas=table,
                calls=native,
                n_calls=len(calls),
                # A caller that holds the target already has begun something that must not stop halfway.
                deadline_ns=time.monotonic_ns() + (30_000_000_000 if traced else 200_000_000),
                die_at=STAGES.index(die_at) + 1 if die_at else 0,
            )
            result = (lib.pl_inject_held if traced else lib.pl_inject)(ctypes.byref(request))
            if result:
                raise PagelensError(f"cannot start the tracing thread: {os.strerror(-result)}")
            if any(slot.done for slot in native):
                for slot, call in zip(native, calls, strict=True):
                    call.result = int(slot.ret) if slot.done else None
                    call.fd = int(slot.fd) if call.take_fd else -1
                return Held(tid, int(request.held_ns), bool(request.restarted))
            last = request
            if request.refused not in (_NO_STOP, _GONE, _RSEQ, _STACK, _IMAGE):
                _explain(proc, request)
        if not proc.alive:
            raise TargetGoneError(f"process {proc.pid} is gone")
        if time.monotonic() > give_up or traced:
            break
        before, vmas = _image(vmas), maps.read(proc)
        if _image(vmas) != before:
            execs, since = execs + 1, time.monotonic()
        if _image(vmas) != before or not gadgets.syscall_ret:
            # A new image, or one that had no C library yet; none after a while: it has none at all.
            gadgets, stacks, table = _looked_up(proc, vmas, last_try=time.monotonic() > since + 0.3)
        time.sleep(0.001 * (execs % 8) if execs else 0.01)  # not in step with it
    if execs > 20:
        raise CapabilityMissingError(
            f"cannot make a system call in process {proc.pid}: it calls exec all the time",
            capability="ptrace",
        )
    _explain(proc, last)
    raise AssertionError("unreachable")


def _looked_up(
    proc: Process, vmas: VmaList, *, last_try: bool
) -> tuple[Gadgets, int, ctypes.Array[_StackVma]]:
    # Code and stacks of the image as it is now. Amid exec the C library may not be mapped yet: no code then, unless
    # it is the last try.
    try:
        return find_gadgets(proc, vmas), *_stacks(vmas)
    except NoCodeError:
        if last_try:
            raise
        return Gadgets(0), *_stacks(vmas)


def _stacks(vmas: VmaList) -> tuple[int, ctypes.Array[_StackVma]]:
    # (how many, each) of what may be a stack.
    found = [v for v in vmas if v.prot & Prot.WRITE and not v.shared]
    rows = (_StackVma(v.start, v.end, 1 if v.name == "[stack]" else 0) for v in found)
    return len(found), (_StackVma * max(1, len(found)))(*rows)


def _image(vmas: VmaList) -> tuple[int, ...]:
    # What stays while a program runs and is drawn anew at each exec.
    fixed = [v for v in vmas if v.name in ("[vdso]", "[vvar]")]
    return tuple(v.start for v in fixed) or tuple(v.end for v in vmas if v.name == "[stack]")


def _explain(proc: Process, request: _Request | None) -> None:
    if not proc.alive:
        raise TargetGoneError(f"process {proc.pid} is gone")
    code, number = (int(request.refused), int(request.error)) if request is not None else (_NO_STOP, 0)
    why = {
        _SEIZE: f"ptrace is refused ({os.strerror(number)})",
        _NO_STOP: "none of its threads can be stopped now (in an uninterruptible wait, or a vfork parent)",
        _GONE: "its threads end faster than they can be asked",
        _BITS32: "it runs 32-bit code",
        _RSEQ: "its thread stays inside a restartable sequence",
        _STACK: "no thread stands on a stack with room that nobody else uses (coroutines?)",
        _FRAME: f"its state cannot be saved on its stack ({os.strerror(number)})",
        _IMAGE: "it calls exec",
        _CALL: f"the call could not be made ({os.strerror(number)})",
    }.get(code, "unknown reason")
    raise CapabilityMissingError(
        f"cannot make a system call in process {proc.pid}: {why}",
        capability="ptrace",
        fix="run pagelens as root (sudo)" if code == _SEIZE and os.geteuid() else "",
    )
