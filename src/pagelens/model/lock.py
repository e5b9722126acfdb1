"""mlock, munlock, mlockall (mm/mlock.c) and msync (mm/msync.c)."""

from __future__ import annotations

from pagelens.model.abi import (
    EAGAIN,
    EBUSY,
    EFAULT,
    EINVAL,
    ENOMEM,
    EPERM,
    MASK,
    MCL_CURRENT,
    MCL_FUTURE,
    MCL_ONFAULT,
    MLOCK_ONFAULT,
    MS_ASYNC,
    MS_INVALIDATE,
    MS_SYNC,
    PAGE,
    SHIFT,
    U64_MAX,
    VM_DROPPABLE,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_LOCKONFAULT,
    VM_SHARED,
    VM_SPECIAL,
    page_align,
)
from pagelens.model.area import Area
from pagelens.model.merge import modify
from pagelens.model.populate import populate_range
from pagelens.model.space import Mm


def _fixup(mm: Mm, area: Area, start: int, end: int, flags: int, event: int) -> int:
    # mlock_fixup.
    old = area.flags
    if flags == old or old & (VM_SPECIAL | VM_DROPPABLE):
        return 0
    changed, flags = modify(mm, area, start, end, flags, event)
    if changed is None:
        return flags
    pages = (end - start) >> SHIFT
    if not flags & VM_LOCKED:
        mm.locked_vm -= pages
    elif not old & VM_LOCKED:
        mm.locked_vm += pages
    changed.flags = flags
    return 0


def _apply(mm: Mm, start: int, length: int, lock: int, event: int) -> int:
    # apply_vma_lock_flags.
    end = start + length
    if end > U64_MAX:
        return EINVAL
    if end == start:
        return 0
    at = start
    while at < end:
        area = mm.areas.at(at)
        if area is None:
            return ENOMEM
        stop = min(area.end, end)
        error = _fixup(mm, area, at, stop, area.flags & ~VM_LOCKED_MASK | lock, event)
        if error:
            return error
        at = stop
    return 0


def _already_locked(mm: Mm, start: int, length: int) -> int:
    # count_mm_mlocked_page_nr.
    end = min(start + length, U64_MAX)
    total = 0
    for area in mm.areas.overlapping(start, end):
        if area.flags & VM_LOCKED:
            total += min(end, area.end) - max(start, area.start)
    return total >> SHIFT


def do_mlock(mm: Mm, start: int, length: int, flags: int, event: int) -> int:
    """mlock2 (mlock with flags 0): 0 or -errno."""
    if flags & ~MLOCK_ONFAULT:
        return EINVAL
    lock = VM_LOCKED | (VM_LOCKONFAULT if flags & MLOCK_ONFAULT else 0)
    if not mm.can_do_mlock:
        return EPERM
    length = page_align(length + (start & (PAGE - 1)))
    start &= MASK
    limit = mm.limits.memlock >> SHIFT
    locked = (length >> SHIFT) + mm.locked_vm
    if locked > limit and not mm.limits.cap_ipc_lock:
        locked -= _already_locked(mm, start, length)
        if locked > limit:
            return ENOMEM
    error = _apply(mm, start, length, lock, event)
    if error:
        return error
    error = populate_range(mm, start, start + length, ignore_errors=False)
    # __mlock_posix_error_return.
    return {EFAULT: ENOMEM, ENOMEM: EAGAIN}.get(error, error)


def do_munlock(mm: Mm, start: int, length: int, event: int) -> int:
    """munlock: 0 or -errno."""
    length = page_align(length + (start & (PAGE - 1)))
    return _apply(mm, start & MASK, length, 0, event)


def do_mlockall(mm: Mm, flags: int, event: int) -> int:
    """mlockall: 0 or -errno."""
    if not flags or flags & ~(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) or flags == MCL_ONFAULT:
        return EINVAL
    if not mm.can_do_mlock:
        return EPERM
    if flags & MCL_CURRENT and mm.total_vm > mm.limits.memlock >> SHIFT and not mm.limits.cap_ipc_lock:
        return ENOMEM
    _apply_all(mm, flags, event)
    if flags & MCL_CURRENT:
        populate_range(mm, 0, mm.layout.task_size, ignore_errors=True)
    return 0


def do_munlockall(mm: Mm, event: int) -> int:
    """munlockall: 0."""
    _apply_all(mm, 0, event)
    return 0


def _apply_all(mm: Mm, flags: int, event: int) -> None:
    # apply_mlockall_flags.
    lock = VM_LOCKED | (VM_LOCKONFAULT if flags & MCL_ONFAULT else 0)
    mm.def_flags &= ~VM_LOCKED_MASK
    if flags & MCL_FUTURE:
        mm.def_flags |= lock
        if not flags & MCL_CURRENT:
            return
    add = lock if flags & MCL_CURRENT else 0
    area = mm.areas.find(0)
    while area is not None:
        end = area.end
        _fixup(mm, area, area.start, end, area.flags & ~VM_LOCKED_MASK | add, event)
        area = mm.areas.find(end)
        if area is not None and area.start < end:
            area = mm.areas.find(area.end)  # merged with what followed


def do_msync(mm: Mm, start: int, length: int, flags: int) -> int:
    """msync: 0 or -errno; MS_SYNC writes dirty pages of shared files back."""
    if flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC) or start & (PAGE - 1):
        return EINVAL
    if flags & MS_ASYNC and flags & MS_SYNC:
        return EINVAL
    end = start + page_align(length)
    if end > U64_MAX:
        return ENOMEM
    if end == start:  # a length so near to 2^64 that it rounds to nothing is nothing
        return 0
    unmapped = 0
    area = mm.areas.find(start)
    while True:
        if area is None:
            return ENOMEM
        if start < area.start:
            if flags == MS_ASYNC:
                return ENOMEM
            start = area.start
            if start >= end:
                return ENOMEM
            unmapped = ENOMEM
        if flags & MS_INVALIDATE and area.flags & VM_LOCKED:
            return EBUSY
        if flags & MS_SYNC and area.file is not None and area.flags & VM_SHARED:
            first = area.pgoff_at(start)
            area.file.writeback(first, first + ((min(end, area.end) - start) >> SHIFT))
        start = area.end
        if start >= end:
            return unmapped
        area = mm.areas.find(start)
