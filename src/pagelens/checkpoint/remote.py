"""The system calls that a held process makes for its own rollback: the vma list, alternate signal stacks.

Everything is made by the leader (an alternate stack by its own thread), with its signals blocked so that none is
delivered into what is being undone. Paths are opened by the process itself, in its own root and mount namespace.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence

from pagelens.checkpoint import undo
from pagelens.linux import pagecopy
from pagelens.linux.hold import Held
from pagelens.linux.inject import Call, remote_calls
from pagelens.linux.procfs import Process
from pagelens.linux.ptrace import Stop, Tracee, request
from pagelens.vm.errors import PagelensError, TargetGoneError, UsageError
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Prot, Vma

PTRACE_SETOPTIONS, TRACESYSGOOD = 0x4200, 1
NR = {"mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "madvise": 28, "open": 2, "close": 3}
NR |= {"sigaltstack": 131, "mlock": 149, "munlock": 150}
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANON, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
Key = tuple[str, int, bool]


def backing_key(vma: Vma) -> Key:
    """What must be open to map it: device, inode, whether for writing."""
    return (vma.dev, vma.inode, vma.shared and bool(vma.prot & Prot.WRITE))


class Caller:
    """Calls made in a held process. fds: backing_key -> descriptor in it. made: how many calls."""

    def __init__(self, proc: Process, held: Held, mem: pagecopy.MemoryFile) -> None:
        self.proc, self.held, self.mem = proc, held, mem
        self.fds: dict[Key, int] = {}
        self.made = 0

    def altstacks(self, stacks: Sequence[tuple[Tracee, tuple[int, int, int]]]) -> None:
        """Set alternate signal stacks (sp, flags, size): stack_t lies in a page that the leader maps for that."""
        scratch = Call(NR["mmap"], (0, PAGE_SIZE, 3, MAP_PRIVATE | MAP_ANON, -1 & 2**64 - 1, 0))
        self.make([scratch])
        page = scratch.result or 0
        try:
            for thread, (sp, flags, size) in stacks:
                os.pwrite(self.mem.fd, struct.pack("<QI4xQ", sp, flags, size), page)
                self.make([Call(NR["sigaltstack"], (page, 0))], thread)
        finally:
            self.make([Call(NR["munmap"], (page, PAGE_SIZE))])

    def make(self, calls: list[Call], thread: Tracee | None = None) -> None:
        """Let `thread` (the leader) make them. PagelensError where one fails: the process is in between."""
        leader = thread or self.held.leader
        mask = leader.sigmask()
        leader.set_sigmask(2**64 - 1)
        request(PTRACE_SETOPTIONS, leader.tid, 0, TRACESYSGOOD)
        leader.stop = Stop(5, 128)  # it moves on from the stop that we found it in
        try:
            remote_calls(self.proc, calls, traced=True, tid=leader.tid)
        finally:
            with contextlib.suppress(TargetGoneError):  # gone, or running on: the error above says why
                request(PTRACE_SETOPTIONS, leader.tid, 0, 0)
                leader.set_sigmask(mask)
        self.made += len(calls)
        for call in calls:
            if call.result is None or (call.result < 0 and call.nr != NR["madvise"]):
                name = next(key for key, number in NR.items() if number == call.nr)
                what = os.strerror(-call.result) if call.result else "not made"
                raise PagelensError(
                    f"process {self.proc.pid}: {name}{call.args} failed in it ({what}); its memory is partly "
                    "rolled back: end it"
                )

    def steps(self, steps: Sequence[undo.Step]) -> None:
        """Undo the vma list."""
        calls, maps, late = [], [], []
        for step in steps:
            size = step.end - step.start
            if step.op == "brk":
                calls.append(Call(NR["brk"], (step.start,)))
            elif step.op == "unmap":
                calls.append(Call(NR["munmap"], (step.start, size)))
            elif step.op == "map" and step.vma is not None:
                maps.append(step.vma)
            elif step.op == "protect":
                late.append(Call(NR["mprotect"], (step.start, size, step.value)))
            elif step.op == "advise":
                late.append(Call(NR["madvise"], (step.start, size, step.value)))
            else:
                late.append(Call(NR["mlock" if step.op == "lock" else "munlock"], (step.start, size)))
        if calls:
            self.make(calls)
        if maps:
            self._map(maps)
        if late:
            self.make(late)

    def _map(self, vmas: list[Vma]) -> None:
        paths = self._open({v.name: v for v in vmas if v.inode and backing_key(v) not in self.fds})
        calls = []
        for vma in vmas:
            flags = MAP_FIXED | (MAP_SHARED if vma.shared else MAP_PRIVATE)
            fd, offset = -1, 0
            if vma.inode:
                fd, offset = self.fds[backing_key(vma)], vma.offset
            else:
                flags |= MAP_ANON
            if "nr" in (vma.vm_flags or ()):
                flags |= MAP_NORESERVE
            calls.append(Call(NR["mmap"], (vma.start, vma.size, int(vma.prot), flags, fd, offset)))
        calls += [Call(NR["close"], (fd,)) for fd in paths]
        self.make(calls)

    def _open(self, wanted: dict[str, Vma]) -> list[int]:
        # Paths are opened by the target itself; their names stand in a page that it maps for that.
        if not wanted:
            return []
        scratch = Call(NR["mmap"], (0, PAGE_SIZE, 3, MAP_PRIVATE | MAP_ANON, -1 & 2**64 - 1, 0))
        self.make([scratch])
        page = scratch.result or 0
        opened = []
        for name, vma in wanted.items():
            path = os.fsencode(name) + b"\0"
            if len(path) > PAGE_SIZE:
                raise UsageError(f"path too long to open in the target: {name[:80]}…")
            os.pwrite(self.mem.fd, path, page)
            key = backing_key(vma)
            call = Call(NR["open"], (page, (os.O_RDWR if key[2] else os.O_RDONLY) | os.O_CLOEXEC, 0))
            self.make([call])
            self.fds[key] = call.result or 0
            opened.append(self.fds[key])
        self.make([Call(NR["munmap"], (page, PAGE_SIZE))])
        return opened
