"""Shared memory in a rollback: it may be other processes' too, and going back changes it under them.

Found while the process is held and before anything is touched. Only memory whose contents differ matters: it is
compared first, and only then the maps of all processes are read. Memory that is mapped read-only here cannot be
written from here at all: if it has changed, another process did it.

What is not seen: who has it open and does not map it (read(2) and write(2) of a memfd or a file).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.concerns import Concern
from pagelens.checkpoint.image import Kind, per_page
from pagelens.checkpoint.memory import InMemory
from pagelens.checkpoint.stored import Stored
from pagelens.linux import mappers, pagecopy, pagemap
from pagelens.linux.procfs import Process
from pagelens.vm.pages import contained
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Prot, Vma, VmaList


@dataclass(slots=True)
class Found:
    """concerns, notes; read_only: address ranges that cannot be written from this process, with changes or
    without."""

    concerns: list[Concern] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    read_only: list[tuple[int, int]] = field(default_factory=list)


def of_others(vma: Vma) -> bool:
    """Whether its contents are saved and may be other processes' too."""
    return vma.shared and bool(vma.inode) and not plans.is_special(vma)


def look(proc: Process, mem: pagecopy.MemoryFile, store: Stored | InMemory, present: VmaList) -> Found:
    """What of the saved shared memory differs now and cannot, or should not, go back. The process is held."""
    found = Found()
    changed: list[Vma] = []
    for vma in store.vmas:
        if not of_others(vma):
            continue
        if not vma.prot & Prot.WRITE:
            found.read_only.append((vma.start, vma.end))
        if _differs(proc, mem, store, vma, present):
            changed.append(vma)
    who = mappers.others(proc.pid, {(v.dev, v.inode) for v in changed})
    for vma in changed:
        what = f"{vma.name or 'shared memory'} at {vma.start:#x}"
        users = who.of.get((vma.dev, vma.inode), [])
        if users:
            names = ", ".join(f"{pid} ({comm})" for pid, comm in users[:4])
            more = f" and {len(users) - 4} more" if len(users) > 4 else ""
            text = f"{what} has changed, and process{'es' if len(users) > 1 else ''} {names}{more} map"
            found.concerns.append(
                Concern("shared", text + ("" if len(users) > 1 else "s") + " it too: it would change there")
            )
        elif not vma.prot & Prot.WRITE:
            found.concerns.append(
                Concern("shared", f"{what} has changed and is mapped read-only here: it would stay as it is")
            )
    if changed and who.unread:
        found.notes.append(
            f"the maps of {who.unread} processes could not be read (no privilege); whether they map the shared "
            "memory that went back is not known"
        )
    return found


def _differs(
    proc: Process, mem: pagecopy.MemoryFile, store: Stored | InMemory, vma: Vma, present: VmaList
) -> bool:
    # Whether the rollback would change the object behind it.
    now_there = [v for v in present.overlapping(vma.start, vma.end) if _same(v, vma)]
    if sum(min(v.end, vma.end) - max(v.start, vma.start) for v in now_there) != vma.size:
        return True  # unmapped since: what it holds cannot be read from here
    flat = store.rows
    lo, hi = np.searchsorted(flat["start"], [np.uint64(vma.start), np.uint64(vma.end)])
    saved = per_page(flat[lo:hi])
    saved = saved[np.isin(saved["kind"], (Kind.DATA, Kind.ZERO))]
    only = VmaList([vma.replaced(vm_flags=now_there[0].vm_flags)])
    rows = per_page(plans.make(proc, only, pagemap.read(proc, only).runs).rows)
    rows = rows[rows["kind"] == Kind.DATA]
    # Of shared memory, a page that the object has now and had not is a change, and one that is missing reads as
    # zeros. Of a file, a page that is not here may have been reclaimed: reading brings it back.
    addr = rows["start"]
    if plans.is_shared_memory(vma) and not contained(addr, saved["start"]).all():
        return True
    common = addr[contained(addr, saved["start"])] if plans.is_shared_memory(vma) else saved["start"]
    for at in range(0, len(common), 4096):
        part = common[at : at + 4096]
        if (_hashes(proc, mem, part) != _saved_hashes(store, part)).any():
            return True
    missing = saved["start"][~contained(saved["start"], addr)]
    return plans.is_shared_memory(vma) and bool((_saved_hashes(store, missing) != _zero()).any())


def _same(now: Vma, then: Vma) -> bool:
    return now.shared and (now.dev, now.inode, now.offset - now.start) == (
        then.dev,
        then.inode,
        then.offset - then.start,
    )


def _hashes(proc: Process, mem: pagecopy.MemoryFile, addr: Any) -> Any:
    buffer = pagecopy.buffer(len(addr))
    pagecopy.read(proc.pid, mem, addr, np.ones(len(addr), np.uint64), buffer)
    return pagecopy.hash_pages(buffer)[0]


def _saved_hashes(store: Stored | InMemory, addr: Any) -> Any:
    where = store.locate(addr)
    out = store.hashes(where)
    out[np.asarray(where.kind) == Kind.ZERO] = _zero()
    return out


def _zero() -> np.uint64:
    return np.uint64(pagecopy.hash_pages(np.zeros(PAGE_SIZE, np.uint8))[0][0])
