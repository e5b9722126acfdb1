"""mprotect (mm/mprotect.c)."""

from __future__ import annotations

import numpy as np

from pagelens.model.abi import (
    AE,
    EACCES,
    EINVAL,
    ENOMEM,
    PAGE,
    PROT_GROWSDOWN,
    PROT_GROWSUP,
    SD,
    SHIFT,
    U64_MAX,
    VM_ACCESS,
    VM_ACCOUNT,
    VM_GROWSDOWN,
    VM_HUGETLB,
    VM_LOCKED,
    VM_NORESERVE,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
    D,
    P,
    W,
    page_align,
)
from pagelens.model.area import Area
from pagelens.model.fault import prot_writable
from pagelens.model.merge import modify
from pagelens.model.populate import populate_area
from pagelens.model.space import Mm

_P, _W = np.uint64(P), np.uint64(W)
_NOT_W = np.uint64(~W & U64_MAX)


def do_mprotect(mm: Mm, start: int, length: int, prot: int, event: int) -> int:
    """do_mprotect_pkey: 0 or -errno; what was done before an error stays done."""
    grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP)
    prot &= ~grows
    if grows == PROT_GROWSDOWN | PROT_GROWSUP or start & (PAGE - 1):
        return EINVAL
    if not length:
        return 0
    length = page_align(length)
    end = (start + length) & U64_MAX
    if end <= start:
        return ENOMEM
    if prot & ~0xF:
        return EINVAL
    area = mm.areas.find(start)
    if area is None or area.start >= end:
        return ENOMEM
    if grows & PROT_GROWSDOWN:
        start = area.start
        if not area.flags & VM_GROWSDOWN:
            return EINVAL
    else:
        if area.start > start:
            return ENOMEM
        if grows & PROT_GROWSUP:
            return EINVAL
    at = start
    while area is not None and at < end:
        if area.start > at:
            return ENOMEM
        flags = area.flags & ~VM_ACCESS | prot & VM_ACCESS
        if flags & ~(flags >> 4) & VM_ACCESS:
            return EACCES
        stop = min(area.end, end)
        error = _fixup(mm, area, at, stop, flags, event)
        if error:
            return error
        # A merge may have taken the area, and what follows it, along: go on behind what is done.
        at = stop
        area = mm.areas.at(at)
    return 0 if at >= end else ENOMEM


def _fixup(mm: Mm, area: Area, start: int, end: int, flags: int, event: int) -> int:
    # mprotect_fixup.
    old = area.flags
    if flags == old:
        return 0
    pages = (end - start) >> SHIFT
    charged = 0
    if flags & VM_WRITE:
        if not mm.may_expand(flags, pages) and mm.may_expand(old, pages):
            return ENOMEM
        if not old & (VM_ACCOUNT | VM_WRITE | VM_HUGETLB | VM_SHARED | VM_NORESERVE):
            if mm.charge(pages):
                return ENOMEM
            charged = pages
            flags |= VM_ACCOUNT
    elif mm.profile.mprotect_unaccounts and old & VM_ACCOUNT and area.is_anon and area.anon_vma is None:
        flags &= ~VM_ACCOUNT
    changed, flags = modify(mm, area, start, end, flags, event)
    if changed is None:
        mm.uncharge(charged)
        return flags
    changed.flags = flags
    change_protection(mm, changed, start, end, event)
    if old & VM_ACCOUNT and not flags & VM_ACCOUNT:
        mm.uncharge(pages)
    if old & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED and flags & VM_WRITE:
        populate_area(mm, changed, start, end)
    mm.stat_account(old, -pages)
    mm.stat_account(flags, pages)
    return 0


def change_protection(mm: Mm, area: Area, start: int, end: int, event: int) -> None:
    """change_pte_range: new write bits for every present page (pte_modify, can_change_pte_writable)."""
    writable = prot_writable(mm, area)
    shared = area.flags & VM_SHARED
    # vma_wants_manual_pte_write_upgrade is asked before vma_set_page_prot: the old vm_page_prot does not fit the new
    # rights, and vma_wants_writenotify says no, except where the file system wants to know of first writes.
    upgrade = bool(area.flags & VM_WRITE)
    if shared:
        upgrade = upgrade and area.file is not None and area.file.page_mkwrite
    need = D if shared else AE
    if not shared and upgrade and mm.profile.mprotect_wants_dirty:
        need |= D
    if mm.profile.soft_dirty and not area.flags & VM_SOFTDIRTY:
        need |= SD
    bits = np.uint64(P | need)
    touched = False
    for _first, chunk, part in mm.tables.spans(start >> SHIFT, end >> SHIFT):
        pte = chunk.pte[part]
        present = (pte & _P) != 0
        if not present.any():
            continue
        touched = True
        before = pte.copy()
        if writable:
            pte[present] |= _W
        else:
            pte &= _NOT_W
            if upgrade:
                pte[(pte & bits) == bits] |= _W
        chunk.event[part][present & (pte != before)] = event
    if touched:
        mm.tables.flush(start, end, "mprotect")
