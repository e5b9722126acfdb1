"""madvise (mm/madvise.c)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagelens.model import abi
from pagelens.model.abi import (
    ANON,
    EACCES,
    EAGAIN,
    EFAULT,
    EINVAL,
    ENOMEM,
    FRAME_SHIFT,
    GUARD,
    PAGE,
    SHIFT,
    SPECIAL,
    U64_MAX,
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_DROPPABLE,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MAYBE_GUARD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_SPECIAL,
    VM_WIPEONFORK,
    VM_WRITE,
    ZERO,
    A,
    D,
    P,
    page_align,
)
from pagelens.model.area import Area
from pagelens.model.fault import anon_prepare
from pagelens.model.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from pagelens.model.frames import F_DIRTY, F_LAZY
from pagelens.model.merge import modify
from pagelens.model.populate import gup
from pagelens.model.space import Mm
from pagelens.model.zap import release, zap_range
from pagelens.vm.pages import U64

_FRAME = np.uint64(FRAME_SHIFT)
_FLAGS = {  # advice: (flags to set, flags to clear)
    abi.MADV_NORMAL: (0, VM_RAND_READ | VM_SEQ_READ),
    abi.MADV_RANDOM: (VM_RAND_READ, VM_SEQ_READ),
    abi.MADV_SEQUENTIAL: (VM_SEQ_READ, VM_RAND_READ),
    abi.MADV_DONTFORK: (VM_DONTCOPY, 0),
    abi.MADV_DOFORK: (0, VM_DONTCOPY),
    abi.MADV_WIPEONFORK: (VM_WIPEONFORK, 0),
    abi.MADV_KEEPONFORK: (0, VM_WIPEONFORK),
    abi.MADV_DONTDUMP: (VM_DONTDUMP, 0),
    abi.MADV_DODUMP: (0, VM_DONTDUMP),
    abi.MADV_HUGEPAGE: (VM_HUGEPAGE, VM_NOHUGEPAGE),
    abi.MADV_NOHUGEPAGE: (VM_NOHUGEPAGE, VM_HUGEPAGE),
}
_OTHER = {
    abi.MADV_REMOVE, abi.MADV_WILLNEED, abi.MADV_DONTNEED, abi.MADV_DONTNEED_LOCKED, abi.MADV_FREE,
    abi.MADV_COLD, abi.MADV_PAGEOUT, abi.MADV_POPULATE_READ, abi.MADV_POPULATE_WRITE,
}  # fmt: skip


def _valid(mm: Mm, advice: int) -> bool:
    # madvise_behavior_valid.
    profile = mm.profile
    if advice in (abi.MADV_MERGEABLE, abi.MADV_UNMERGEABLE):
        return profile.ksm
    if advice in (abi.MADV_HUGEPAGE, abi.MADV_NOHUGEPAGE, abi.MADV_COLLAPSE):
        return profile.thp
    if advice in (abi.MADV_GUARD_INSTALL, abi.MADV_GUARD_REMOVE):
        return profile.guard_pages
    return advice in _FLAGS or advice in _OTHER


def do_madvise(mm: Mm, start: int, length: int, advice: int, event: int) -> int:
    """madvise: 0 or -errno; holes are skipped and give ENOMEM at the end."""
    if not _valid(mm, advice) or start & (PAGE - 1):
        return EINVAL
    size = page_align(length)
    if length and not size:
        return EINVAL
    end = start + size
    if end > U64_MAX:
        return EINVAL
    if end == start:
        return 0
    populating = advice in (abi.MADV_POPULATE_READ, abi.MADV_POPULATE_WRITE)
    if populating and (not _has_hole(mm, start, end) or mm.profile.populate_stops_at_hole):
        return _populate(mm, start, end, advice)
    unmapped = 0
    at = start
    while at < end:
        area = mm.areas.find(at)
        if area is None:
            return ENOMEM
        if at < area.start:
            unmapped = ENOMEM
            at = area.start
            if at >= end:
                break
        stop = min(area.end, end)
        if populating:
            # 6.1: madvise_populate is called for the first area and goes on to the end of that one.
            error = _populate(mm, at, stop, advice)
        else:
            error = _one(mm, area, at, stop, advice, event)
        if error:
            return error
        at = stop
    return unmapped


def _has_hole(mm: Mm, start: int, end: int) -> bool:
    areas = mm.areas.overlapping(start, end)
    return sum(min(a.end, end) - max(a.start, start) for a in areas) < end - start


def _one(mm: Mm, area: Area, start: int, end: int, advice: int, event: int) -> int:
    # madvise_vma_behavior.
    flags = area.flags
    if advice in (abi.MADV_DONTNEED, abi.MADV_DONTNEED_LOCKED, abi.MADV_FREE):
        forbidden = VM_PFNMAP | (0 if advice == abi.MADV_DONTNEED_LOCKED else VM_LOCKED)
        if flags & forbidden:
            return EINVAL
        if advice == abi.MADV_FREE:
            return _free(mm, area, start, end)
        zap_range(mm, start, end, event=event)
        empty = _empty_tables(mm, start, end)
        if empty and mm.profile.pt_reclaim:  # zap_pte_range with reclaim_pt
            mm.tables.pte_tables.difference_update(empty)
        return 0
    if advice in (abi.MADV_COLD, abi.MADV_PAGEOUT):
        if flags & (VM_LOCKED | VM_PFNMAP | VM_HUGETLB):
            return EINVAL
        if advice == abi.MADV_COLD:
            _age(mm, start, end)
        else:
            _pageout(mm, area, start, end, event)
        return 0
    if advice == abi.MADV_WILLNEED:
        return 0
    if advice == abi.MADV_REMOVE:
        return _remove(area, start, end)
    if advice == abi.MADV_COLLAPSE:
        return EINVAL
    if advice == abi.MADV_GUARD_INSTALL:
        return _guard_install(mm, area, start, end, event)
    if advice == abi.MADV_GUARD_REMOVE:
        return _guard_remove(mm, area, start, end, event)
    if advice == abi.MADV_MERGEABLE:
        # ksm_madvise: shared and special areas ignore the advice.
        refuse = VM_MERGEABLE | VM_SHARED | VM_MAYSHARE | VM_SPECIAL | VM_HUGETLB
        new = flags if flags & refuse or flags & VM_DROPPABLE else flags | VM_MERGEABLE
    elif advice == abi.MADV_UNMERGEABLE:
        new = flags & ~VM_MERGEABLE
    else:
        if advice == abi.MADV_DOFORK and flags & VM_SPECIAL:
            return EINVAL
        if advice == abi.MADV_WIPEONFORK and (area.file is not None or flags & VM_SHARED):
            return EINVAL
        if advice == abi.MADV_KEEPONFORK and flags & VM_DROPPABLE:
            return EINVAL
        if advice == abi.MADV_DODUMP and flags & (VM_SPECIAL | VM_DROPPABLE):
            return EINVAL
        put, clear = _FLAGS[advice]
        new = flags & ~clear | put
    if new == flags:
        return 0
    changed, new = modify(mm, area, start, end, new, event)
    if changed is None:
        return EAGAIN if new == ENOMEM else new
    changed.flags = new
    return 0


def _free(mm: Mm, area: Area, start: int, end: int) -> int:
    # madvise_free_pte_range: pages lose their dirty and accessed bits and are freed only under pressure.
    if not area.is_anon:
        return EINVAL
    frames_of = mm.machine.frames
    for _first, chunk, part in mm.tables.spans(start >> SHIFT, end >> SHIFT):
        pte = chunk.pte[part]
        hit = (pte & np.uint64(P | ZERO | SPECIAL)) == np.uint64(P)
        if not hit.any():
            continue
        frames = (pte >> _FRAME).astype(np.int64)
        dirty = hit & ((frames_of.flags[frames] & F_DIRTY) != 0)
        hit &= ~(dirty & (frames_of.mapcount[frames] != 1))
        frames_of.flags[frames[hit & dirty]] &= np.uint8(~F_DIRTY & 0xFF)
        pte[hit] &= np.uint64(~(A | D) & U64_MAX)
        anon = hit & ((pte & np.uint64(ANON)) != 0)
        frames_of.flags[frames[anon]] |= F_LAZY
    return 0


def _age(mm: Mm, start: int, end: int) -> None:
    # madvise_cold_or_pageout_pte_range for MADV_COLD: pages mapped once lose their accessed bit.
    for _first, chunk, part in mm.tables.spans(start >> SHIFT, end >> SHIFT):
        pte = chunk.pte[part]
        pte[_mapped_once(mm, pte)] &= np.uint64(~A & U64_MAX)


def _mapped_once(mm: Mm, pte: U64) -> npt.NDArray[np.bool_]:
    hit: npt.NDArray[np.bool_] = (pte & np.uint64(P | ZERO | SPECIAL)) == np.uint64(P)
    if hit.any():
        hit &= mm.machine.frames.mapcount[(pte >> _FRAME).astype(np.int64)] == 1
    return hit


def _pageout(mm: Mm, area: Area, start: int, end: int, event: int) -> None:
    # MADV_PAGEOUT without swap: of the pages mapped once, reclaim takes those that need no writing. They are
    # clean pages of the cache (shmem too: never written, they read as zeros again) and lazily freed ones.
    frames_of = mm.machine.frames
    for first, chunk, part in mm.tables.spans(start >> SHIFT, end >> SHIFT):
        pte = chunk.pte[part]
        hit = _mapped_once(mm, pte)
        frames = (pte >> _FRAME).astype(np.int64)
        flags = frames_of.flags[frames]
        anon = (pte & np.uint64(ANON)) != 0
        dirty = ((pte & np.uint64(D)) != 0) | ((flags & F_DIRTY) != 0)
        if area.flags & VM_DROPPABLE:  # try_to_unmap_one drops what is dirty as well
            dirty &= ~anon
        lazy = anon & ((flags & F_LAZY) != 0)
        frames_of.flags[frames[hit & lazy & dirty]] &= np.uint8(~F_LAZY & 0xFF)
        gone = hit & ~dirty & (lazy | ~anon)
        pte[hit & ~gone] &= np.uint64(~A & U64_MAX)
        if not gone.any():
            continue
        release(mm, pte[gone])
        pte[gone] = 0
        chunk.event[part][gone] = event
        if area.file is not None:
            for i in np.flatnonzero(gone & ~anon).tolist():
                area.file.drop_page(area.pgoff_at((first + i) << SHIFT))


def _remove(area: Area, start: int, end: int) -> int:
    # madvise_remove.
    if area.flags & VM_LOCKED or area.file is None:
        return EINVAL
    if area.flags & (VM_SHARED | VM_MAYWRITE) != VM_SHARED | VM_MAYWRITE:  # vma_is_shared_maywrite
        return EACCES
    offset = area.pgoff_at(start) << SHIFT
    return area.file.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, end - start)


def _guard_install(mm: Mm, area: Area, start: int, end: int, event: int) -> int:
    # madvise_guard_install.
    profile = mm.profile
    if area.flags & (VM_SPECIAL | VM_HUGETLB | VM_LOCKED):
        return EINVAL
    if (not area.is_anon or not area.flags & VM_WRITE) and not profile.guard_file:
        return EINVAL
    if profile.guard_vma_flag:
        area.flags |= VM_MAYBE_GUARD
        if area.is_anon:
            anon_prepare(mm, area)
    else:
        anon_prepare(mm, area)
    zap_range(mm, start, end, event=event)
    first, last = start >> SHIFT, end >> SHIFT
    mm.tables.ensure_range(first, last)
    for _first, chunk, part in mm.tables.spans(first, last, create=True):
        # guard_install_pte_entry: what is a marker already stays as it is, with its soft-dirty bit.
        new = (chunk.pte[part] & np.uint64(GUARD)) == 0
        chunk.pte[part][new] = np.uint64(GUARD)
        chunk.event[part][new] = event
    return 0


def _guard_remove(mm: Mm, area: Area, start: int, end: int, event: int) -> int:
    # madvise_guard_remove.
    if area.flags & (VM_SPECIAL | VM_HUGETLB):
        return EINVAL
    if (not area.is_anon or not area.flags & VM_WRITE) and not mm.profile.guard_file:
        return EINVAL
    for _first, chunk, part in mm.tables.spans(start >> SHIFT, end >> SHIFT):
        hit = (chunk.pte[part] & np.uint64(GUARD)) != 0
        chunk.pte[part][hit] = 0
        chunk.event[part][hit] = event
    return 0


def _empty_tables(mm: Mm, start: int, end: int) -> list[int]:
    # PTE tables wholly inside the range that hold nothing (any more).
    tables = mm.tables
    empty = []
    for number in range((start + (1 << 21) - 1) >> 21, end >> 21):
        if number in tables.pte_tables:
            chunk = tables.chunks.get(number >> 6)
            base = (number & 63) << 9
            if chunk is None or not chunk.pte[base : base + 512].any():
                empty.append(number)
    return empty


def _populate(mm: Mm, start: int, end: int, advice: int) -> int:
    # madvise_populate, faultin_page_range.
    write = advice == abi.MADV_POPULATE_WRITE
    at = start
    while at < end:
        area = mm.areas.at(at)
        if area is None:
            return ENOMEM
        need = VM_WRITE if write else abi.VM_READ
        if area.flags & (abi.VM_IO | VM_PFNMAP) or not area.flags & need:
            return EINVAL
        stop = min(area.end, end)
        if gup(mm, area, at, stop, write=write):
            return EFAULT
        at = stop
    return 0
