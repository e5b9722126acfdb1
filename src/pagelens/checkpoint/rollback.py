"""Put a process back to a checkpoint, in place.

Order: hold all threads; find what cannot be brought back, and refuse before anything is touched; set alternate
signal stacks and undo the vma list by system calls that the process makes (`remote`); drop pages that were absent;
write the pages that differ (compared by content, so a page that is the same is not touched); set the registers;
let go.

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

from pagelens.checkpoint import concerns, shared, undo
from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.image import Kind, ProcessState, ThreadState, per_page
from pagelens.checkpoint.memory import InMemory
from pagelens.checkpoint.remote import NR, Caller, backing_key
from pagelens.checkpoint.state import prepare, read_state
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.views import Views
from pagelens.linux import pagecopy, pagemap, smaps
from pagelens.linux.hold import Held
from pagelens.linux.inject import Call
from pagelens.linux.procfs import Process
from pagelens.linux.ptrace import NT_X86_XSTATE, Tracee, UserRegs
from pagelens.linux.restart import restartable
from pagelens.vm.errors import CapabilityMissingError, UsageError
from pagelens.vm.pages import contained, distinct
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import Prot, Vma, VmaList

Source = Stored | InMemory
_CONFINED = "it is confined by seccomp, whose filter might kill it for the system calls that this needs"
_USERFAULT = frozenset(("um", "uw", "ui"))  # VmFlags of registered ranges
DONTNEED, REMOVE, GUARD_INSTALL, GUARD_REMOVE = 4, 9, 102, 103
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
    if pid != store.process.pid:
        raise UsageError(
            f"the checkpoint is of process {store.process.pid} ({store.process.comm}), not of {pid}"
        )
    if store.manifest["range"] is not None:
        raise UsageError(f"{store.path} holds only a range; a rollback needs the whole process")
    saved = store.process
    flat = per_page(store.rows)
    if (flat["kind"] == Kind.UNREADABLE).any():
        raise UsageError(f"{store.path} lacks pages that could not be read; it cannot be rolled back to")
    prepare()
    store.check(store.locate(flat["start"]))  # all that may be needed; before it is held
    with Process.open(pid, starttime=saved.starttime if pid == saved.pid else None) as proc:
        held = Held(pid)
        with held, pagecopy.MemoryFile(pid, write=True) as mem:
            job = _Job(proc, held, mem, store, flat)
            with contextlib.closing(job.sharing):
                accepted, notes = job.check(accept)
                if dry_run:
                    return RolledBack(0, 0, 0, 0, len(held.threads), 0, tuple(accepted), tuple(notes))
                job.run()
        return RolledBack(
            job.compared,
            job.written,
            job.dropped,
            job.caller.made,
            len(saved.threads),
            held.held_ns,
            tuple(accepted),
            tuple(notes + job.notes),
        )


def rollback_held(
    proc: Process, held: Held, mem: pagecopy.MemoryFile, store: Source, accept: Collection[str]
) -> _Job:
    """The same for a process that is held already and watched by us; returns the job with its figures."""
    job = _Job(proc, held, mem, store, per_page(store.rows), watched=True)
    with contextlib.closing(job.sharing):
        job.check(accept)
        job.run()
    return job


class _Job:
    def __init__(
        self,
        proc: Process,
        held: Held,
        mem: pagecopy.MemoryFile,
        store: Source,
        flat: Any,
        *,
        watched: bool = False,  # by us, with asynchronous write protection
    ) -> None:
        self.watched = watched
        self.proc, self.held, self.mem, self.store = proc, held, mem, store
        self.views = Views(store.vmas, flat)
        self.flat = self.views.rows  # a row a page; of shared memory, where it is written
        self.saved = store.process
        self.steps: list[undo.Step] = []
        self.stacks: list[tuple[Tracee, tuple[int, int, int]]] = []  # alternate signal stacks to set
        self.caller = Caller(proc, held, mem)
        self.confined = False  # by seccomp
        self.compared = self.written = self.dropped = 0
        self.notes: list[str] = []
        self.sharing = shared.Found()

    # -- before anything is touched

    def check(self, accept: Collection[str]) -> tuple[list[str], list[str]]:
        """Concerns and refusals; (accepted concerns, notes). Also reads all saved contents once."""
        present, _ = smaps.read(self.proc)
        now = read_state(self.proc, self.held, present, backing=False)
        found, notes = concerns.compare(self.saved, now)
        shared.look(self.proc, self.mem, self.store, self.views, present, self.sharing)
        found += self.sharing.concerns
        notes += self.sharing.notes
        found += self._changed_files()
        refused = [concern for concern in found if concern.kind not in accept]
        self.steps, impossible = undo.steps(self.store.vmas, present, self.saved.start_brk)
        impossible += self._find_backings(present) + self._find_altstacks(now) + self._unfit()
        own = [] if self.watched else [v for v in present if (v.vm_flags or frozenset()) & _USERFAULT]
        if own:
            impossible.append(
                f"it handles page faults itself (userfaultfd: {own[0]}), and writing there could wait for its handler, "
                "which stands still"
            )
        texts = concerns.listed(refused) + impossible
        if texts:
            hint = sorted({c.kind for c in refused})
            how = f"; --accept {','.join(hint)} goes on all the same" if hint and not impossible else ""
            raise UsageError(f"process {self.proc.pid} cannot be rolled back: {'; '.join(texts)}{how}")
        if self.held.leader.tid != self.proc.pid and self._needs_calls():
            raise UsageError(
                f"the leader of process {self.proc.pid} has exited; it cannot make the calls needed"
            )
        return [c.text for c in found if c.kind in accept], notes

    def _changed_files(self) -> list[concerns.Concern]:
        # A clean page is the file's: where that was written to since, it cannot be as it was.
        ours = {v.name for v in self.store.vmas if v.shared and v.prot & Prot.WRITE}  # mtime is its own doing
        by_reference = self.store.vmas.find_many(self.flat["start"][self.flat["kind"] == Kind.FILE])
        names = {self.store.vmas[int(i)].name for i in set(by_reference.tolist())} - ours
        out = []
        for name in sorted(names):
            entry = self.saved.backing.get(name, {"missing": ""})
            try:
                stat = os.stat(f"/proc/{self.proc.pid}/root{name}")  # noqa: PTH116 - through its root
            except OSError:
                continue  # another file's name now, or none's: the mapping keeps the one that it has
            changed = (stat.st_size, stat.st_mtime_ns) != (entry.get("size"), entry.get("mtime_ns"))
            if "missing" not in entry and stat.st_ino == entry["inode"] and changed:
                out.append(concerns.Concern("files", f"{name}, which it maps, was written to since"))
        return out

    def _needs_calls(self) -> bool:
        return bool(self.steps or self.stacks)

    def _unfit(self) -> list[str]:
        # What a leader that is held cannot be asked for, or what registers alone would break.
        status = self.proc.read("status").decode(errors="replace")
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        out = []
        self.confined = lines.get("Seccomp", "0").strip() != "0"
        if self._needs_calls() and self.confined:
            out.append(_CONFINED)
        if "shstk" in lines.get("x86_Thread_features", ""):
            out.append("it runs with a shadow stack, which nobody outside can write back")
        return out

    def _find_altstacks(self, now: ProcessState) -> list[str]:
        # Which differ; one that its thread stands on cannot be exchanged (do_sigaltstack: EPERM).
        refused = []
        present = {t.tid: t for t in now.threads}
        held = {t.tid: t for t in self.held.threads}
        for thread in self.saved.threads:
            other = present.get(thread.tid)
            if (
                other is None
                or None in (thread.altstack, other.altstack)
                or thread.altstack == other.altstack
            ):
                continue
            assert thread.altstack is not None
            assert other.altstack is not None
            sp, _, size = other.altstack
            if sp < other.regs["rsp"] <= sp + size:
                refused.append(f"thread {thread.tid} stands on another alternate signal stack than it had")
            else:
                self.stacks.append((held[thread.tid], thread.altstack))
        return refused

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
        key = backing_key(vma)
        major, minor = (int(part, 16) for part in vma.dev.split(":"))
        for file in self.saved.files:
            # A descriptor that is still open (checked by the concerns) is the surest way.
            same = file.inode == vma.inode and (os.major(file.dev), os.minor(file.dev)) == (major, minor)
            if same and (not key[2] or file.flags & 3 == os.O_RDWR):
                self.caller.fds[key] = file.fd
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
        if self.stacks:
            self.caller.altstacks(self.stacks)
        if self.steps:
            self.caller.steps(self.steps)
        self._drop(self._read_pages())
        self._contents()
        for thread in self.held.threads:
            state = next((t for t in self.saved.threads if t.tid == thread.tid), None)
            if state is not None:
                set_thread(thread, state)

    def _read_pages(self) -> Any:
        # Per page, as a dump would see them now: kind (image.Kind), state, and the vma's index as `block`.
        vmas = self.store.vmas
        rows = per_page(plans.make(self.proc, vmas, pagemap.read(self.proc, vmas).runs).rows)
        rows = self.views.fold(rows)
        rows["block"] = vmas.find_many(rows["start"])
        return rows

    def _drop(self, now: Any) -> None:
        # Populated now and absent then: dropped, so that they read as zeros or as their file again.
        kind = self.views.locate(now["start"]).kind
        vmas = list(self.store.vmas)

        def of_vma(test: Callable[[Vma], bool]) -> Any:
            return np.array([test(v) for v in vmas])[now["block"]]

        data, guard = now["kind"] == Kind.DATA, now["kind"] == Kind.GUARD
        data &= ~self.sharing.unwritable(now["start"])
        free = ~of_vma(lambda v: plans.is_special(v) or "lo" in (v.vm_flags or ()))
        drop = free & ~of_vma(lambda v: v.shared) & data & np.isin(kind, (0, Kind.FILE))
        remove = free & of_vma(plans.is_shared_memory) & data & (kind == 0)
        punch = remove & self.sharing.by_file(now["start"])
        calls = _ranges(now["start"][drop], DONTNEED) + _ranges(now["start"][remove & ~punch], REMOVE)
        calls += _ranges(now["start"][guard & (kind != Kind.GUARD)], GUARD_REMOVE)
        was_guard = self.flat["start"][self.flat["kind"] == Kind.GUARD]
        calls += _ranges(was_guard[~contained(was_guard, now["start"][guard])], GUARD_INSTALL)
        if (
            calls and self.confined
        ):  # nothing was touched yet: it needs no other calls, or check() had refused
            raise UsageError(f"process {self.proc.pid} cannot be rolled back: {_CONFINED}")
        if calls:
            self.caller.make(calls)
        self.sharing.punch(now["start"][punch])
        self.dropped = int(drop.sum() + remove.sum())

    def _contents(self) -> None:
        now = self._read_pages()
        # Saved contents, and what must be zero: saved zeros, and pages that the calls above could not drop.
        flat = self.flat
        data, zero = flat[flat["kind"] == Kind.DATA], flat["start"][flat["kind"] == Kind.ZERO]
        populated = now["start"][np.isin(now["kind"], (Kind.DATA, Kind.ZERO, Kind.FILE))]
        anonymous = np.array([not v.inode for v in self.store.vmas])
        left = now["start"][(now["kind"] == Kind.DATA) & anonymous[now["block"]]]
        left = left[self.views.locate(left).kind == 0]
        self._write(data["start"][~self.sharing.unwritable(data["start"])], populated)
        zero = distinct(np.concatenate((zero[contained(zero, populated)], left)))
        self._write_zero(zero[~self.sharing.unwritable(zero)])

    def _write(self, addr: Any, populated: Any) -> None:
        for at in range(0, len(addr), 4096):
            part = addr[at : at + 4096]
            where = self.views.locate(part)
            saved = self.store.hashes(where)
            here = contained(part, populated)
            differs = ~here
            there = part[here]
            if len(there):
                differs[here] = pagecopy.hashes_of(self.proc.pid, self.mem, there) != saved[here]
            self.compared += len(part)
            wrong = part[differs]
            if len(wrong):
                self._put(wrong, self.store.contents(self.views.locate(wrong)))

    def _write_zero(self, addr: Any) -> None:
        for at in range(0, len(addr), 4096):
            part = addr[at : at + 4096]
            wrong = part[pagecopy.hashes_of(self.proc.pid, self.mem, part) != np.uint64(_ZERO_HASH)]
            self.compared += len(part)
            if len(wrong):
                self._put(wrong, np.zeros((len(wrong), PAGE_SIZE), np.uint8))

    def _put(self, addr: Any, pages: Any) -> None:
        self.written += len(addr)
        by_file = self.sharing.by_file(addr)
        self.sharing.write(addr[by_file], pages[by_file])
        addr, pages = addr[~by_file], pages[~by_file]
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


def set_thread(thread: Tracee, state: ThreadState) -> None:
    """Registers, FP and vector state, signal mask of a held thread as they were."""
    thread.set_regset(NT_X86_XSTATE, state.xstate)
    thread.set_regs(restartable(UserRegs.from_dict(state.regs)))
    thread.set_sigmask(state.sigmask)


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
