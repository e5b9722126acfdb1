"""Put a process back to a checkpoint, in place.

Order: hold all threads; find what cannot be brought back, and refuse before anything is touched; undo the vma
list by system calls that the leader makes; drop pages that were absent; write the pages that differ (compared
by content, so a page that is the same is not touched); set the registers; let go.

What can fail is looked for before the first change. If a step fails after it all the same (the target was
killed, or refuses a call that it could make before), the error says that the process is partly rolled back and
should be ended; it is let go, because a stopped process that nobody watches is worse. A SIGKILL of pagelens in
that window (milliseconds) has the same effect.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagelens.checkpoint import concerns, undo
from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.image import Kind, ThreadState, per_page
from pagelens.checkpoint.memory import InMemory
from pagelens.checkpoint.state import read_state
from pagelens.checkpoint.stored import Stored
from pagelens.linux import pagecopy, pagemap, smaps
from pagelens.linux.hold import Held
from pagelens.linux.inject import Call, remote_calls
from pagelens.linux.procfs import Process
from pagelens.linux.ptrace import ERESTART_RESTARTBLOCK, NT_X86_XSTATE, Stop, Tracee, UserRegs, request
from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError, UsageError
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import Prot, Vma, VmaList

Source = Stored | InMemory
PTRACE_SETOPTIONS, TRACESYSGOOD = 0x4200, 1
NR = {"mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "madvise": 28, "open": 2, "close": 3}
NR |= {"mlock": 149, "munlock": 150}
DONTNEED, REMOVE, GUARD_INSTALL, GUARD_REMOVE = 4, 9, 102, 103
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANON, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_ZERO_HASH = int(pagecopy.hash_pages(np.zeros(PAGE_SIZE, np.uint8))[0][0])


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What a rollback did. written_pages: contents that differed; dropped_pages: populated since;
    vma_calls: system calls that undid the vma list; stopped_ns: how long the process was held."""

    compared_pages: int
    written_pages: int
    dropped_pages: int
    vma_calls: int
    threads: int
    stopped_ns: int
    accepted: tuple[str, ...]
    notes: tuple[str, ...]


def rollback(pid: int, store: Stored, *, accept: Collection[str] = (), dry_run: bool = False) -> RolledBack:
    """Roll process `pid` back to `store`.

    accept: kinds of concerns.KINDS that are reported rather than refused. dry_run: only check.
    Raises UsageError (another process, or something that memory cannot bring back), CapabilityMissingError,
    TargetGoneError, DamagedInputError (checked for every page before anything is touched).
    """
    unknown = set(accept) - set(concerns.KINDS)
    if unknown:
        raise UsageError(
            f"no such kind: {', '.join(sorted(unknown))} (there are: {', '.join(concerns.KINDS)})"
        )
    if store.manifest["range"] is not None:
        raise UsageError(f"{store.path} holds only a range; a rollback needs the whole process")
    saved = store.process
    flat = per_page(store.rows)
    if (flat["kind"] == Kind.UNREADABLE).any():
        raise UsageError(f"{store.path} lacks pages that could not be read; it cannot be rolled back to")
    with Process.open(pid, starttime=saved.starttime if pid == saved.pid else None) as proc:
        held = Held(pid)
        with held, pagecopy.MemoryFile(pid, write=True) as mem:
            job = _Job(proc, held, mem, store, flat)
            accepted, notes = job.check(accept)
            if dry_run:
                return RolledBack(0, 0, 0, 0, len(held.threads), 0, tuple(accepted), tuple(notes))
            job.run()
        return RolledBack(
            job.compared,
            job.written,
            job.dropped,
            job.calls,
            len(saved.threads),
            held.held_ns,
            tuple(accepted),
            tuple(notes + job.notes),
        )


def rollback_held(
    proc: Process, held: Held, mem: pagecopy.MemoryFile, store: Source, accept: Collection[str]
) -> _Job:
    """The same for a process that is held already; returns the job with its figures."""
    job = _Job(proc, held, mem, store, per_page(store.rows))
    job.check(accept)
    job.run()
    return job


class _Job:
    def __init__(self, proc: Process, held: Held, mem: pagecopy.MemoryFile, store: Source, flat: Any) -> None:
        self.proc, self.held, self.mem, self.store, self.flat = proc, held, mem, store, flat
        self.saved = store.process
        self.steps: list[undo.Step] = []
        self.fds: dict[tuple[str, int, bool], int] = {}  # (dev, inode, writable) -> descriptor in the target
        self.compared = self.written = self.dropped = self.calls = 0
        self.notes: list[str] = []

    # -- before anything is touched

    def check(self, accept: Collection[str]) -> tuple[list[str], list[str]]:
        """Concerns and refusals; (accepted concerns, notes). Also reads all saved contents once."""
        present, _ = smaps.read(self.proc)
        now = read_state(self.proc, self.held, present, backing=False)
        found, notes = concerns.compare(self.saved, now)
        refused = [concern for concern in found if concern.kind not in accept]
        self.steps, impossible = undo.steps(self.store.vmas, present, self.saved.start_brk)
        impossible += self._find_backings(present)
        texts = [f"{c.text} [{c.kind}]" for c in refused] + impossible
        if texts:
            hint = sorted({c.kind for c in refused})
            how = f"; --accept {','.join(hint)} goes on all the same" if hint and not impossible else ""
            raise UsageError(f"process {self.proc.pid} cannot be rolled back: {'; '.join(texts)}{how}")
        if self.held.leader.tid != self.proc.pid and self._needs_calls():
            raise UsageError(
                f"the leader of process {self.proc.pid} has exited; it cannot make the calls needed"
            )
        self.store.hashes(self.store.locate(self.flat["start"]))
        return [c.text for c in found if c.kind in accept], notes

    def _needs_calls(self) -> bool:
        return bool(self.steps)

    def _find_backings(self, present: VmaList) -> list[str]:
        # Everything that must be mapped anew must still be there.
        refused = []
        for step in self.steps:
            vma = step.vma
            if step.op != "map" or vma is None or not vma.inode:
                continue
            if vma.name == "/dev/zero (deleted)" or not self._reachable(vma):
                refused.append(f"{vma} was unmapped since and what it mapped cannot be opened any more")
        del present
        return refused

    def _reachable(self, vma: Vma) -> bool:
        key = (vma.dev, vma.inode, vma.shared and bool(vma.prot & Prot.WRITE))
        major, minor = (int(part, 16) for part in vma.dev.split(":"))
        for file in self.saved.files:
            # A descriptor that is still open (checked by the concerns) is the surest way.
            same = file.inode == vma.inode and (os.major(file.dev), os.minor(file.dev)) == (major, minor)
            if same and (not key[2] or file.flags & 3 == os.O_RDWR):
                self.fds[key] = file.fd
                return True
        entry = self.saved.backing.get(vma.name)
        if entry is None or "missing" in entry:
            return False
        try:
            stat = os.stat(f"/proc/{self.proc.pid}/root{vma.name}")  # noqa: PTH116 - through its root
        except OSError:
            return False
        return (stat.st_ino, stat.st_size, stat.st_mtime_ns) == (
            entry["inode"],
            entry["size"],
            entry["mtime_ns"],
        )

    # -- the rollback

    def run(self) -> None:
        """All of it. The leader's signals are blocked so that none is delivered into what is being undone."""
        if self.steps:
            self._vmas()
        self._drop(self._read_pages())
        self._contents()
        for thread in self.held.threads:
            state = next((t for t in self.saved.threads if t.tid == thread.tid), None)
            if state is not None:
                set_thread(thread, state)

    def _remote(self, calls: list[Call]) -> None:
        leader = self.held.leader
        mask = leader.sigmask()
        leader.set_sigmask(2**64 - 1)
        request(PTRACE_SETOPTIONS, leader.tid, 0, TRACESYSGOOD)
        leader.stop = Stop(5, 128)  # it moves on from the stop that we found it in
        try:
            remote_calls(self.proc, calls, traced=True)
        finally:
            with contextlib.suppress(TargetGoneError):  # gone, or running on: the error above says why
                request(PTRACE_SETOPTIONS, leader.tid, 0, 0)
                leader.set_sigmask(mask)
        self.calls += len(calls)
        for call in calls:
            if call.result is None or (call.result < 0 and call.nr != NR["madvise"]):
                name = next(key for key, number in NR.items() if number == call.nr)
                what = os.strerror(-call.result) if call.result else "not made"
                raise PagelensError(
                    f"process {self.proc.pid}: {name}{call.args} failed in it ({what}); its memory is partly "
                    "rolled back: end it"
                )

    def _vmas(self) -> None:
        calls, maps, late = [], [], []
        for step in self.steps:
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
            self._remote(calls)
        if maps:
            self._map(maps)
        if late:
            self._remote(late)

    def _map(self, vmas: list[Vma]) -> None:
        paths = self._open({v.name: v for v in vmas if v.inode and self._key(v) not in self.fds})
        calls = []
        for vma in vmas:
            flags = MAP_FIXED | (MAP_SHARED if vma.shared else MAP_PRIVATE)
            fd, offset = -1, 0
            if vma.inode:
                fd, offset = self.fds[self._key(vma)], vma.offset
            else:
                flags |= MAP_ANON
            if "nr" in (vma.vm_flags or ()):
                flags |= MAP_NORESERVE
            calls.append(Call(NR["mmap"], (vma.start, vma.size, int(vma.prot), flags, fd, offset)))
        calls += [Call(NR["close"], (fd,)) for fd in paths]
        self._remote(calls)

    def _key(self, vma: Vma) -> tuple[str, int, bool]:
        return (vma.dev, vma.inode, vma.shared and bool(vma.prot & Prot.WRITE))

    def _open(self, wanted: dict[str, Vma]) -> list[int]:
        # Paths are opened by the target itself; their names stand in a page that it maps for that.
        if not wanted:
            return []
        scratch = Call(NR["mmap"], (0, PAGE_SIZE, 3, MAP_PRIVATE | MAP_ANON, -1 & 2**64 - 1, 0))
        self._remote([scratch])
        page = scratch.result or 0
        opened = []
        for name, vma in wanted.items():
            path = os.fsencode(name) + b"\0"
            if len(path) > PAGE_SIZE:
                raise UsageError(f"path too long to open in the target: {name[:80]}…")
            os.pwrite(self.mem.fd, path, page)
            key = self._key(vma)
            call = Call(NR["open"], (page, (os.O_RDWR if key[2] else os.O_RDONLY) | os.O_CLOEXEC, 0))
            self._remote([call])
            self.fds[key] = call.result or 0
            opened.append(self.fds[key])
        self._remote([Call(NR["munmap"], (page, PAGE_SIZE))])
        return opened

    def _read_pages(self) -> Any:
        # Per page, as a dump would see them now: kind (image.Kind), state, and the vma's index as `block`.
        vmas = self.store.vmas
        rows = per_page(plans.make(self.proc, vmas, pagemap.read(self.proc, vmas).runs).rows)
        rows["block"] = vmas.find_many(rows["start"])
        return rows

    def _drop(self, now: Any) -> None:
        # Populated now and absent then: dropped, so that they read as zeros or as their file again.
        kind = self.store.locate(now["start"]).kind
        vmas = list(self.store.vmas)

        def of_vma(test: Callable[[Vma], bool]) -> Any:
            return np.array([test(v) for v in vmas])[now["block"]]

        data, guard = now["kind"] == Kind.DATA, now["kind"] == Kind.GUARD
        free = ~of_vma(lambda v: plans.is_special(v) or "lo" in (v.vm_flags or ()))
        drop = free & ~of_vma(lambda v: v.shared) & data & np.isin(kind, (0, Kind.FILE))
        remove = free & of_vma(plans.is_shared_memory) & data & (kind == 0)
        calls = _ranges(now["start"][drop], DONTNEED) + _ranges(now["start"][remove], REMOVE)
        calls += _ranges(now["start"][guard & (kind != Kind.GUARD)], GUARD_REMOVE)
        was_guard = self.flat["start"][self.flat["kind"] == Kind.GUARD]
        calls += _ranges(np.setdiff1d(was_guard, now["start"][guard]), GUARD_INSTALL)
        if calls:
            self._remote(calls)
        self.dropped = int(drop.sum() + remove.sum())

    def _contents(self) -> None:
        now = self._read_pages()
        # Saved contents, and what must be zero: saved zeros, and pages that the calls above could not drop.
        flat = self.flat
        data, zero = flat[flat["kind"] == Kind.DATA], flat["start"][flat["kind"] == Kind.ZERO]
        populated = now["start"][np.isin(now["kind"], (Kind.DATA, Kind.ZERO, Kind.FILE))]
        anonymous = np.array([not v.inode for v in self.store.vmas])
        left = now["start"][(now["kind"] == Kind.DATA) & anonymous[now["block"]]]
        left = left[self.store.locate(left).kind == 0]
        self._write(data["start"], populated)
        self._write_zero(np.union1d(np.intersect1d(zero, populated), left))

    def _write(self, addr: Any, populated: Any) -> None:
        for at in range(0, len(addr), 4096):
            part = addr[at : at + 4096]
            where = self.store.locate(part)
            saved = self.store.hashes(where)
            here = np.isin(part, populated)
            differs = ~here
            there = part[here]
            if len(there):
                buffer = pagecopy.buffer(len(there))
                pagecopy.read(self.proc.pid, self.mem, there, np.ones(len(there), np.uint64), buffer)
                differs[here] = pagecopy.hash_pages(buffer)[0] != saved[here]
            self.compared += len(part)
            wrong = part[differs]
            if len(wrong):
                self._put(wrong, self.store.contents(self.store.locate(wrong)))

    def _write_zero(self, addr: Any) -> None:
        for at in range(0, len(addr), 4096):
            part = addr[at : at + 4096]
            buffer = pagecopy.buffer(len(part))
            pagecopy.read(self.proc.pid, self.mem, part, np.ones(len(part), np.uint64), buffer)
            wrong = part[pagecopy.hash_pages(buffer)[0] != np.uint64(_ZERO_HASH)]
            self.compared += len(part)
            if len(wrong):
                self._put(wrong, np.zeros((len(wrong), PAGE_SIZE), np.uint8))

    def _put(self, addr: Any, pages: Any) -> None:
        bad = pagecopy.write(
            self.proc.pid,
            self.mem,
            addr,
            np.ones(len(addr), np.uint64),
            np.ascontiguousarray(pages).reshape(-1),
        )
        if bad.any():
            first = int(addr[np.flatnonzero(bad)[0]])
            vma = self.store.vmas.find(first)
            raise CapabilityMissingError(
                f"{int(bad.sum())} pages from {first:#x} ({vma}) cannot be written; the process is partly "
                "rolled back: end it"
            )
        self.written += len(addr)


def set_thread(thread: Tracee, state: ThreadState) -> None:
    """Registers, FP and vector state, signal mask of a held thread as they were."""
    thread.set_regset(NT_X86_XSTATE, state.xstate)
    thread.set_regs(restartable(UserRegs.from_dict(state.regs)))
    thread.set_sigmask(state.sigmask)


def restartable(regs: UserRegs) -> UserRegs:
    """Registers with which an interrupted system call goes on.

    -ERESTARTSYS and its kin work as they are: the kernel looks at orig_rax when it lets go. Only
    ERESTART_RESTARTBLOCK needs what the kernel remembers of the call (its deadline), and that may be of a
    later call by now; so the call is made again from its arguments: a relative sleep starts anew.
    """
    if regs.in_syscall and regs.result == -ERESTART_RESTARTBLOCK:
        regs.rax = regs.orig_rax
        regs.rip -= 2
        regs.orig_rax = 2**64 - 1
    return regs


def _ranges(addr: Any, advice: int) -> list[Call]:
    # Adjacent pages as one madvise each.
    if not len(addr):
        return []
    addr = np.sort(addr)
    first = np.flatnonzero(np.concatenate(([True], np.diff(addr) != PAGE_SIZE)))
    count = np.diff(np.concatenate((first, [len(addr)])))
    return [
        Call(NR["madvise"], (int(addr[f]), int(c) << PAGE_SHIFT, advice))
        for f, c in zip(first.tolist(), count.tolist(), strict=True)
    ]
