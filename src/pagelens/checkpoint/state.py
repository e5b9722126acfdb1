"""Read everything but page contents from a process that is held still."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import Any

import numpy as np

from pagelens.checkpoint.image import OpenFile, ProcessState, ThreadState
from pagelens.linux import altstack, pagecopy
from pagelens.linux.hold import Held
from pagelens.linux.memory import read_memory
from pagelens.linux.procfs import Process
from pagelens.linux.ptrace import Tracee, libc
from pagelens.linux.restart import true_call
from pagelens.vm.errors import PagelensError, TargetGoneError, UsageError
from pagelens.vm.vma import VmaList

SIGNAL_FIELDS = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")


def prepare() -> None:
    """Load what would otherwise be loaded while a process is held, and hold it longer: numpy.ma (np.unique imports
    it: 20 ms of CPU time), the C core, the BPF iterator."""
    np.unique(np.zeros(1))
    pagecopy.hash_bytes(b"")
    pagecopy.room()
    altstack.prepare()


def read_state(proc: Process, held: Held, vmas: VmaList, *, backing: bool = True) -> ProcessState:
    """State of process and threads. `held` must hold it. backing: also identify the mapped files.

    Raises UsageError where another process shares its address space: that one is not held, and goes on writing.
    """
    stat = proc.stat()
    born = children(proc)
    for other in (stat.ppid, *born):
        if _shares_memory(proc.pid, other):
            raise UsageError(
                f"process {other} shares the address space of process {proc.pid} (clone with CLONE_VM) and would go on "
                "writing to it; nothing was touched"
            )
    status = _status(proc)
    notes: list[str] = []
    stacks, unknown = altstack.read(proc.pid)
    if unknown:
        notes.append(f"alternate signal stacks are not known: {unknown}")
    threads = tuple(_thread(proc, thread, stacks.get(thread.tid)) for thread in held.threads)
    group = held.leader.queued_signals(shared=True)
    if group:
        notes.append(f"{len(group)} signals were queued for the process; they stay queued there")
    return ProcessState(
        pid=proc.pid,
        starttime=proc.starttime,
        comm=stat.comm,
        exe=_link(proc, "exe"),
        cmdline=tuple(
            part.decode(errors="replace") for part in proc.read("cmdline").rstrip(b"\0").split(b"\0")
        ),
        cwd=_link(proc, "cwd"),
        uid=int(status.get("Uid", "0").split()[0]),
        gid=int(status.get("Gid", "0").split()[0]),
        ppid=stat.ppid,
        auxv=proc.read("auxv"),
        start_brk=stat.start_brk,
        vmas=vmas,
        threads=threads,
        files=open_files(proc),
        children=born,
        signals={name: int(status.get(name, "0"), 16) for name in SIGNAL_FIELDS},
        time_ns=time.monotonic_ns(),
        notes=tuple(notes),
        backing=identities(proc, vmas) if backing else {},
    )


def _shares_memory(pid: int, other: int) -> bool:
    # kcmp(2); where we may not compare, or the kernel cannot, it says -1. A parent that waits in vfork does nothing.
    if libc.syscall(312, pid, other, 1, 0, 0):  # KCMP_VM
        return False
    try:
        with open(f"/proc/{other}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"D"
    except OSError:
        return False


def _status(proc: Process) -> dict[str, str]:
    out = {}
    for line in proc.read("status").decode(errors="replace").splitlines():
        key, _, value = line.partition(":")
        out[key] = value.strip()
    return out


def _link(proc: Process, name: str) -> str:
    with contextlib.suppress(PagelensError):
        return proc.readlink(name)
    return ""


def _thread(proc: Process, thread: Tracee, stack: altstack.Altstack | None) -> ThreadState:
    stop = thread.stop
    stopped = stop is not None and (stop.is_signal_delivery or stop.is_group_stop)
    rseq = thread.rseq()
    return ThreadState(
        tid=thread.tid,
        comm=proc.read_task(thread.tid, "comm").decode(errors="replace").rstrip("\n"),
        regs=true_call(thread.regs(), lambda addr, length: read_memory(proc.pid, addr, length)).as_dict(),
        fpregs=thread.fpregs(),
        xstate=thread.xstate(),
        sigmask=thread.sigmask(),
        rseq=None if rseq is None else (rseq.pointer, rseq.size, rseq.signature, rseq.flags),
        altstack=stack,
        pending=tuple(thread.queued_signals(shared=False)) + tuple(thread.pending),
        stop_signal=stop.signal if stop is not None and stopped else 0,
    )


def open_files(proc: Process) -> tuple[OpenFile, ...]:
    """Descriptors with target, offset and flags; those that vanish meanwhile are left out."""
    out = []
    base = f"/proc/{proc.pid}"
    try:
        names = os.listdir(f"{base}/fd")  # noqa: PTH208 - names only
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"process {proc.pid} is gone") from None
    for name in sorted(names, key=int):
        try:
            target = os.readlink(f"{base}/fd/{name}")  # noqa: PTH115 - anon_inode:… is no path
            stat = os.stat(f"{base}/fd/{name}")  # noqa: PTH116 - as above
            with open(f"{base}/fdinfo/{name}", encoding="ascii", errors="replace") as file:
                info = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
        except OSError:
            continue
        pos, flags = int(info.get("pos", "0")), int(info.get("flags", "0"), 8)
        out.append(OpenFile(int(name), target, pos, flags, stat.st_dev, stat.st_ino))
    return tuple(out)


def children(proc: Process) -> tuple[int, ...]:
    """Child processes, zombies included (CONFIG_PROC_CHILDREN, else by every process's ppid)."""
    out: set[int] = set()
    try:
        for tid in proc.tasks():
            out |= {int(pid) for pid in proc.read_task(tid, "children").split()}
    except PagelensError:
        for name in os.listdir("/proc"):  # noqa: PTH208 - names only
            if name.isdigit():
                with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                    if int(file.read().rpartition(b")")[2].split()[1]) == proc.pid:
                        out.add(int(name))
    return tuple(sorted(out))


def identities(proc: Process, vmas: VmaList) -> dict[str, dict[str, Any]]:
    """path -> {dev, inode, size, mtime_ns, build_id} of each mapped file that can still be found by its name.

    A file that is not there, or is another one now, gets {"missing": why}.
    """
    out: dict[str, dict[str, Any]] = {}
    root = f"/proc/{proc.pid}/root"
    for vma in vmas:
        if not vma.inode or not vma.name.startswith("/") or vma.name in out:
            continue
        try:
            stat = os.stat(root + vma.name)  # noqa: PTH116 - through the target's root
        except OSError as error:
            out[vma.name] = {"inode": vma.inode, "missing": error.strerror}
            continue
        if stat.st_ino != vma.inode:
            out[vma.name] = {"inode": vma.inode, "missing": "another file has that name now"}
            continue
        entry: dict[str, Any] = {
            "dev": stat.st_dev,
            "inode": stat.st_ino,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }
        with contextlib.suppress(OSError), open(root + vma.name, "rb") as file:
            build_id = elf_build_id(file.read(4096))
            if build_id:
                entry["build_id"] = build_id
        out[vma.name] = entry
    return out


def elf_build_id(head: bytes) -> str:
    """The GNU build-id (hex) in the first page of an ELF file, or ""."""
    if head[:5] != b"\x7fELF\x02" or len(head) < 64:
        return ""
    phoff = int.from_bytes(head[32:40], "little")
    size, count = struct.unpack_from("<HH", head, 54)
    for i in range(count):
        at = phoff + i * size
        if at + 56 > len(head):
            break
        kind = int.from_bytes(head[at : at + 4], "little")
        offset, length = (int.from_bytes(head[at + k : at + k + 8], "little") for k in (8, 32))
        if kind != 4:  # PT_NOTE
            continue
        note = head[offset : offset + length]
        while len(note) >= 12:
            namesz, descsz, ntype = struct.unpack_from("<III", note)
            desc = 12 + (namesz + 3 & ~3)
            if ntype == 3 and note[12:16] == b"GNU\0":
                return note[desc : desc + descsz].hex()
            note = note[desc + (descsz + 3 & ~3) :]
    return ""
