"""Faults that the kernel takes for the program: populate, mlock, MADV_POPULATE (mm/gup.c).

They raise min_flt but make no fault event (mm_account_fault returns without registers); the system call's
`gup` counts them.
"""

from __future__ import annotations

from pagelens.model import batch
from pagelens.model.abi import (
    AE,
    ANON,
    EFAULT,
    FRAME_SHIFT,
    PAGE,
    SHIFT,
    SPECIAL,
    VM_IO,
    VM_LOCKONFAULT,
    VM_MAYREAD,
    VM_MAYWRITE,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    ZERO,
    D,
    P,
    W,
)
from pagelens.model.area import Area
from pagelens.model.batch import anon_pages, first_guard
from pagelens.model.fault import execute_only, handle, unshare
from pagelens.model.frames import F_DIRTY
from pagelens.model.space import Mm


def populate_area(mm: Mm, area: Area, start: int, end: int) -> int:
    """populate_vma_page_range: 0 or -errno."""
    if area.flags & VM_LOCKONFAULT:
        return 0
    write = area.flags & (VM_WRITE | VM_SHARED) == VM_WRITE
    return gup(mm, area, start, end, write=write, force=area.accessible)


def gup(
    mm: Mm, area: Area, start: int, end: int, *, write: bool, force: bool = False, remote: bool = False
) -> int:
    """__get_user_pages over one area: fault every page that is not there, or not writable."""
    flags = area.flags
    if flags & (VM_IO | VM_PFNMAP) or (not remote and execute_only(mm, area)):
        return EFAULT
    if write:
        if not flags & VM_WRITE and not (force and flags & VM_MAYWRITE and not flags & VM_SHARED):
            return EFAULT
    elif not flags & VM_READ and not (force and flags & VM_MAYREAD):
        return EFAULT
    tables = mm.tables
    machine = mm.machine
    event = machine.events.current
    if area.is_anon and end - start >= batch.SMALL << SHIFT:
        return _gup_anon(mm, area, start >> SHIFT, end >> SHIFT, write)
    for page in range(start >> SHIFT, end >> SHIFT):
        while True:
            pte = tables.get(page)
            if remote and not write and pte & (P | ANON | AE | ZERO) == P | ANON:
                unshare(mm, area, page, pte, event)
                machine.count_fault(False, gup=True)
                continue
            if pte & P and (not write or pte & W):
                if write and not pte & (D | ZERO | SPECIAL):
                    machine.frames.flags[pte >> FRAME_SHIFT] |= F_DIRTY  # follow_page_pte, FOLL_TOUCH
                break
            outcome = handle(mm, area, page, write, event)
            if outcome in ("bus", "segv"):
                return EFAULT
            machine.count_fault(outcome == "major", gup=True)
    return 0


def remote_access(mm: Mm, addr: int, length: int, *, write: bool) -> int:
    """process_vm_rw_core: bytes that could be reached in another address space, up to the first failure."""
    at, end = addr, addr + length
    frames = mm.machine.frames
    while at < end:
        area = mm.areas.at(at)
        if area is None:
            break
        page = at & ~(PAGE - 1)
        if gup(mm, area, page, page + PAGE, write=write, remote=True):
            break
        pte = mm.tables.get(page >> SHIFT)
        if write and not pte & (ZERO | SPECIAL):
            frames.flags[pte >> FRAME_SHIFT] |= F_DIRTY  # unpin_user_pages_dirty_lock
        at = min(page + PAGE, end)
    return at - addr


def _gup_anon(mm: Mm, area: Area, first: int, last: int, write: bool) -> int:
    for start, chunk, part in mm.tables.spans(first, last, create=True):
        pte = chunk.pte[part]
        guard = first_guard(pte)
        if guard >= 0:
            stop = part.start + guard
            if stop > part.start:
                anon_pages(mm, area, start, chunk, slice(part.start, stop), write, 0, None)
            return EFAULT
        anon_pages(mm, area, start, chunk, part, write, 0, None)
    return 0


def populate_range(mm: Mm, start: int, end: int, *, ignore_errors: bool) -> int:
    """__mm_populate: 0 or -errno; holes give ENOMEM unless errors are ignored."""
    at = start
    while at < end:
        area = mm.areas.find(at)
        if area is None or area.start >= end:
            break
        begin, stop = max(at, area.start), min(end, area.end)
        at = stop
        if area.flags & (VM_IO | VM_PFNMAP):
            continue
        error = populate_area(mm, area, begin, stop)
        if error and not ignore_errors:
            return error
    return 0
