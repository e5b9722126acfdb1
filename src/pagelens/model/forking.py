"""fork: dup_mmap and copy_page_range (kernel/fork.c, mm/memory.c), and exit (exit_mmap)."""

from __future__ import annotations

import numpy as np

from pagelens.model.abi import (
    AE,
    ANON,
    FRAME_SHIFT,
    GUARD,
    SHIFT,
    SHMEM,
    SPECIAL,
    VM_ACCOUNT,
    VM_DONTCOPY,
    VM_LOCKED_MASK,
    VM_MAYBE_GUARD,
    VM_MAYWRITE,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SHARED,
    VM_UFFD_WP,
    VM_WIPEONFORK,
    ZERO,
    A,
    D,
    P,
    W,
)
from pagelens.model.area import Area, fork_chain, unlink_chain
from pagelens.model.space import Mm
from pagelens.model.zap import zap_range

_FRAME = np.uint64(FRAME_SHIFT)


def dup_mm(parent: Mm, event: int) -> Mm | None:
    """A copy of the address space as fork makes it; None where the commit limit forbids it."""
    child = Mm(parent.machine, parent.layout, parent.limits)
    child.parent = (parent.number, event)
    parent.machine.parents[child.number] = child.parent
    child.start_brk, child.brk = parent.start_brk, parent.brk
    child.total_vm, child.data_vm = parent.total_vm, parent.data_vm
    child.exec_vm, child.stack_vm = parent.exec_vm, parent.stack_vm
    for old in list(parent.areas):
        if old.flags & VM_DONTCOPY:
            child.stat_account(old.flags, -old.pages)
            continue
        if old.flags & VM_ACCOUNT and child.charge(old.pages):
            exit_mm(child, event)
            return None
        new = old.copy(event)
        new.event = event
        new.flags &= ~VM_LOCKED_MASK
        if not old.flags & VM_WIPEONFORK:
            fork_chain(new, old)
        child.areas.insert(new)
        if not old.flags & VM_WIPEONFORK and _needs_copy(new, old):
            copy_range(child, parent, old, event)
    child.hiwater_rss, child.hiwater_vm = child.rss, child.total_vm
    parent.tables.flush(0, parent.layout.task_size, "fork write-protects")
    return child


def _needs_copy(new: Area, old: Area) -> bool:
    # vma_needs_copy: what a fault can fill again is not copied.
    flags = VM_PFNMAP | VM_MIXEDMAP | VM_MAYBE_GUARD
    return bool(new.flags & VM_UFFD_WP or old.flags & flags or old.anon_vma is not None)


def copy_range(child: Mm, parent: Mm, area: Area, event: int) -> None:
    """copy_page_range: share every page, write-protected where copy-on-write applies."""
    frames_of = parent.machine.frames
    cow = area.flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE
    first, last = area.start >> SHIFT, area.end >> SHIFT
    # copy_p4d_range and below allocate each level that the parent has, even where nothing hangs under it.
    ours, theirs = child.tables, parent.tables
    ours.pud_tables.update(_within(theirs.pud_tables, first >> 27, (last - 1) >> 27))
    ours.pmd_tables.update(_within(theirs.pmd_tables, first >> 18, (last - 1) >> 18))
    if ours.levels == 5:
        ours.p4d_tables.update(_within(theirs.p4d_tables, first >> 36, (last - 1) >> 36))
    ours.pte_tables.update(_within(theirs.pte_tables, first >> 9, (last - 1) >> 9))
    for start, chunk, part in parent.tables.spans(first, last):
        pte = chunk.pte[part]
        if not pte.any():
            continue
        if cow:
            pte &= np.uint64(~(W | AE) & (1 << 64) - 1)
        keep = (pte & np.uint64(P | GUARD)) != 0
        new = np.where(keep, pte, np.uint64(0))
        new[(new & np.uint64(GUARD)) != 0] = np.uint64(GUARD)  # copy_pte_marker: a new one, not soft-dirty
        clear = A | (D if area.flags & VM_SHARED else 0)
        new &= np.uint64(~clear & (1 << 64) - 1)
        base = start & 32767
        target = child.tables.chunk(start >> 15)
        span = slice(base, base + len(new))
        target.pte[span] = new
        target.event[span] = np.where(keep, event, 0)
        present = new[(new & np.uint64(P)) != 0]
        plain = present[(present & np.uint64(ZERO | SPECIAL)) == 0]
        if len(plain):
            n_anon = int(np.count_nonzero(plain & np.uint64(ANON)))
            n_shmem = int(np.count_nonzero(plain & np.uint64(SHMEM)))
            child.rss_anon += n_anon
            child.rss_shmem += n_shmem
            child.rss_file += len(plain) - n_anon - n_shmem
            frames_of.map_many((plain >> _FRAME).astype(np.int64))


def _within(tables: set[int], first: int, last: int) -> list[int]:
    # The numbers of [first, last] that exist, whichever is shorter to go through.
    if last - first > len(tables):
        return [t for t in tables if first <= t <= last]
    return [t for t in range(first, last + 1) if t in tables]


def exit_mm(mm: Mm, event: int) -> None:
    """exit_mmap: every page and table goes."""
    for area in list(mm.areas):
        zap_range(mm, area.start, area.end, event=event, guards=True)
        if area.flags & VM_ACCOUNT:
            mm.uncharge(area.pages)
        unlink_chain(area)
        mm.areas.remove(area)
    tables = mm.tables
    for numbers in (tables.pte_tables, tables.pmd_tables, tables.pud_tables, tables.p4d_tables):
        numbers.clear()
    tables.chunks.clear()
    mm.total_vm = mm.data_vm = mm.exec_vm = mm.stack_vm = mm.locked_vm = 0
