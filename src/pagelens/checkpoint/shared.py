"""Shared memory in a rollback: it may be other processes' too, and going back changes it under them.

Found while the process is held and before anything is touched. Only memory whose contents differ matters: it is
compared first, once for each object however often it is mapped here (`views`), and only then the maps and
descriptors of all processes are read. Shared memory without a name (memfd) that is mapped read-only here everywhere
goes back through its file, where that can be opened for writing (map_files, or a descriptor of the process). A sealed
one, one with a name and a file on disk stay as they are: if they have changed, another process did it. So do rings that
the kernel shares with the process (io_uring, AIO).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.concerns import Concern
from pagelens.checkpoint.image import U64, Kind, ProcessState, per_page
from pagelens.checkpoint.memory import InMemory
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.views import Key, View, Views, of_others
from pagelens.linux import mappers, pagecopy, pagemap
from pagelens.linux.procfs import Process
from pagelens.linux.ptrace import libc
from pagelens.vm.errors import PagelensError
from pagelens.vm.pages import contained
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Prot, Vma, VmaList

_SEAL_WRITE, _SEAL_FUTURE_WRITE = 0x8, 0x10
_PUNCH_HOLE = 0x3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_MAY_CHANGE = (Kind.DATA, Kind.ZERO)


@dataclass(slots=True)
class Found:
    """concerns, notes; read_only: address ranges that cannot be written from this process, with changes or
    without; files: (start, end, descriptor of ours, offset at start) of those that are written by their file."""

    concerns: list[Concern] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    read_only: list[tuple[int, int]] = field(default_factory=list)
    files: list[tuple[int, int, int, int]] = field(default_factory=list)

    def unwritable(self, addr: U64) -> Any:
        """Which pages cannot be written."""
        out = np.zeros(len(addr), bool)
        for start, end in self.read_only:
            out |= (addr >= np.uint64(start)) & (addr < np.uint64(end))
        return out

    def by_file(self, addr: U64) -> Any:
        """Which pages are written by `write` and `punch`."""
        out = np.zeros(len(addr), bool)
        for start, end, _, _ in self.files:
            out |= (addr >= np.uint64(start)) & (addr < np.uint64(end))
        return out

    def write(self, addr: U64, pages: np.ndarray) -> None:
        """Contents of pages, through their files. PagelensError."""
        for at, page in zip(addr.tolist(), pages, strict=True):
            fd, offset = self._place(at)
            with _partly(at):
                os.pwrite(fd, page, offset)

    def punch(self, addr: U64) -> None:
        """Pages that the object had not: as MADV_REMOVE, through their files. PagelensError."""
        for at in addr.tolist():
            fd, offset = self._place(at)
            with _partly(at):
                if libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(PAGE_SIZE)):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def _place(self, addr: int) -> tuple[int, int]:
        part = next(part for part in self.files if part[0] <= addr < part[1])
        return part[2], part[3] + addr - part[0]

    def close(self) -> None:
        """Close the files."""
        for _, _, fd, _ in self.files:
            os.close(fd)
        self.files = []


@contextlib.contextmanager
def _partly(addr: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PagelensError(
            f"the shared page at {addr:#x} cannot be written ({error.strerror}); the process is partly rolled back: "
            "end it"
        ) from None


def look(
    proc: Process,
    mem: pagecopy.MemoryFile,
    store: Stored | InMemory,
    views: Views,
    present: VmaList,
    found: Found,
) -> None:
    """What of the saved shared memory differs now and cannot, or should not, go back, into `found` (empty; the
    caller closes it). The process is held."""
    changed: dict[Key, list[View]] = {}
    objects = _Objects(proc, mem, store, views, present)
    for view in views.here():
        if objects.differs(view):
            changed.setdefault((view.vma.dev, view.vma.inode), []).append(view)
    who = mappers.others(proc.pid, {key: group[0].vma.name for key, group in changed.items()})
    for view in views.here():
        if plans.is_ring(view.vma):
            found.read_only.append((view.start, view.end))
        elif not view.vma.prot & Prot.WRITE:
            fd = _writable(proc.pid, view.vma, store.process, present)
            if fd is None:
                found.read_only.append((view.start, view.end))
            else:
                offset = view.vma.offset + view.start - view.vma.start
                found.files.append((view.start, view.end, fd, offset))
    stays = set(found.read_only)
    for key, group in changed.items():
        what = f"{group[0].vma.name or 'shared memory'} at {group[0].vma.start:#x}"
        users = _named(who.of.get(key, []), "map", "maps") + _named(who.holders.get(key, []), "have", "has")
        if plans.is_ring(group[0].vma):
            text = f"{what} has changed, and the kernel goes on from where it is: it would stay as it is"
            found.concerns.append(Concern("shared", text))
        elif users:
            text = f"{what} has changed, and {' and '.join(users)}: it would change there"
            found.concerns.append(Concern("shared", text))
        elif any((view.start, view.end) in stays for view in group):
            found.concerns.append(
                Concern("shared", f"{what} has changed and is mapped read-only here: it would stay as it is")
            )
    if changed and who.unread:
        found.notes.append(
            f"the maps of {who.unread} processes could not be read (no privilege); whether they use the shared "
            "memory that went back is not known"
        )


def _named(users: list[tuple[int, str]], many: str, one: str) -> list[str]:
    if not users:
        return []
    names = ", ".join(f"{pid} ({comm})" for pid, comm in users[:4])
    more = f" and {len(users) - 4} more" if len(users) > 4 else ""
    verb, what = (many, "processes") if len(users) > 1 else (one, "process")
    return [f"{what} {names}{more} {verb} it {'too' if many == 'map' else 'open'}"]


def _writable(pid: int, vma: Vma, saved: ProcessState, present: VmaList) -> int | None:
    # A descriptor of ours through which the pages of shared memory can be written, although no mapping can. Not of
    # what others may come to by its name: a file of /dev/shm, a System V segment. hugetlbfs has no write(2).
    nameless = vma.name.endswith(" (deleted)") and not vma.name.startswith("/SYSV")
    if not nameless or not plans.is_shared_memory(vma) or "ht" in (vma.vm_flags or ()):
        return None
    same = [v for v in present if v.shared and (v.dev, v.inode) == (vma.dev, vma.inode)]
    paths = [f"/proc/{pid}/map_files/{v.start:x}-{v.end:x}" for v in same]
    paths += [f"/proc/{pid}/fd/{f.fd}" for f in saved.files if f.inode == vma.inode and f.target == vma.name]
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError:
                seals = 0  # of a kind that has none
            if os.fstat(fd).st_ino == vma.inode and not seals & (_SEAL_WRITE | _SEAL_FUTURE_WRITE):
                return fd
            os.close(fd)
    return None


class _Objects:
    # The pages that shared objects have now, and whether they differ.

    def __init__(
        self,
        proc: Process,
        mem: pagecopy.MemoryFile,
        store: Stored | InMemory,
        views: Views,
        present: VmaList,
    ) -> None:
        self.proc, self.mem, self.store, self.views, self.present = proc, mem, store, views, present
        there = [(vma, self._mapped(vma)) for vma in store.vmas if of_others(vma)]
        only = VmaList([vma.replaced(vm_flags=flags) for vma, flags in there if flags is not None])
        self.gone = {vma.start for vma, flags in there if flags is None}
        rows = per_page(plans.make(proc, only, pagemap.read(proc, only).runs).rows) if len(only) else None
        held = views.rows[:0] if rows is None else views.fold(rows[rows["kind"] == Kind.DATA])
        self.now = held["start"]

    def _mapped(self, vma: Vma) -> frozenset[str] | None:
        # The vma's flags now, if it is mapped as it was, whole; else None.
        now = [v for v in self.present.overlapping(vma.start, vma.end) if _same(v, vma)]
        size = sum(min(v.end, vma.end) - max(v.start, vma.start) for v in now)
        return (now[0].vm_flags or frozenset()) if size == vma.size else None

    def differs(self, view: View) -> bool:
        """Whether the rollback would change the object behind it."""
        if view.vma.start in self.gone:
            return True  # unmapped since: what it holds cannot be read from here
        lo, hi = np.searchsorted(self.now, [np.uint64(view.start), np.uint64(view.end)])
        addr = self.now[lo:hi]
        rows = self.views.rows
        lo, hi = np.searchsorted(rows["start"], [np.uint64(view.start), np.uint64(view.end)])
        saved = rows[lo:hi]["start"][np.isin(rows[lo:hi]["kind"], _MAY_CHANGE)]
        # Of shared memory, a page that the object has now and had not is a change, and one that is missing reads
        # as zeros. Of a file, a page that is not here may have been reclaimed: reading brings it back.
        memory = plans.is_shared_memory(view.vma)
        if memory and not contained(addr, saved).all():
            return True
        common = addr if memory else saved
        if (pagecopy.hashes_of(self.proc.pid, self.mem, common) != self._saved_hashes(common)).any():
            return True
        missing = saved[~contained(saved, addr)]
        return memory and bool((self._saved_hashes(missing) != _zero()).any())

    def _saved_hashes(self, addr: Any) -> Any:
        where = self.views.locate(addr)
        out = self.store.hashes(where)
        out[np.asarray(where.kind) == Kind.ZERO] = _zero()
        return out


def _same(now: Vma, then: Vma) -> bool:
    return now.shared and (now.dev, now.inode, now.offset - now.start) == (
        then.dev,
        then.inode,
        then.offset - then.start,
    )


def _zero() -> np.uint64:
    return np.uint64(pagecopy.hash_pages(np.zeros(PAGE_SIZE, np.uint8))[0][0])
