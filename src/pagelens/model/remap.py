"""mremap (mm/mremap.c): shrink, expand in place, move; MREMAP_FIXED and MREMAP_DONTUNMAP."""

from __future__ import annotations

from dataclasses import dataclass

from pagelens.model.abi import (
    EAGAIN,
    EFAULT,
    EINVAL,
    ENOMEM,
    MAP_FIXED,
    MAP_SHARED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    PMD_SIZE,
    SHIFT,
    VM_ACCOUNT,
    VM_DONTEXPAND,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_MAYSHARE,
    VM_PFNMAP,
    VM_SHARED,
    page_align,
)
from pagelens.model.area import Area, clone_chain, unlink_chain
from pagelens.model.mapping import do_munmap, do_munmap_range
from pagelens.model.merge import merge_new, split
from pagelens.model.movetables import move_tables
from pagelens.model.placement import get_unmapped_area
from pagelens.model.populate import populate_range
from pagelens.model.space import Mm

_ULONG_MAX = (1 << 64) - 1
_PMD_MASK = PMD_SIZE - 1


@dataclass(slots=True)
class _Remap:
    """vma_remap_struct: what is asked for, and what is left to do."""

    mm: Mm
    addr: int
    old_len: int
    new_len: int
    flags: int
    new_addr: int
    event: int
    populate: bool = False

    @property
    def to_new_place(self) -> bool:
        return bool(self.flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))


def do_mremap(mm: Mm, addr: int, old_len: int, new_len: int, flags: int, new_addr: int, event: int) -> int:
    """The new address or -errno."""
    if flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP) or addr & (PAGE - 1):
        return EINVAL
    if flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) and not flags & MREMAP_MAYMOVE:
        return EINVAL
    raw_equal = old_len == new_len
    old_len, new_len = page_align(old_len), page_align(new_len)
    if flags & MREMAP_DONTUNMAP and not (old_len == new_len if mm.profile.mremap_checks_first else raw_equal):
        return EINVAL
    if not new_len:
        return EINVAL
    r = _Remap(mm, addr, old_len, new_len, flags, new_addr, event)
    result = _new_order(r) if mm.profile.mremap_checks_first else _old_order(r)
    if result >= 0 and r.populate and new_len > old_len:
        populate_range(mm, result + old_len, result + new_len, ignore_errors=True)
    return result


def _params_of_new_place(r: _Remap) -> int:
    if r.new_addr & (PAGE - 1) or r.new_len > r.mm.layout.task_size:
        return EINVAL
    if r.new_addr > r.mm.layout.task_size - r.new_len:
        return EINVAL
    # vrm_overlaps (mremap_to before 6.17): unsigned long, so the end of an absurd length wraps below its start.
    if (r.addr + r.old_len) & _ULONG_MAX > r.new_addr and r.new_addr + r.new_len > r.addr:
        return EINVAL
    return 0


def _old_order(r: _Remap) -> int:
    # To 6.16: sys_mremap, mremap_to, vma_to_resize. Targets are unmapped before all is checked, and
    # lengths are not: an absurd one wraps to just below the start.
    mm = r.mm
    area = mm.areas.at(r.addr)
    if area is None:
        return EFAULT
    if r.to_new_place:
        error = _params_of_new_place(r)
        if error:
            return error
        if mm.map_count + 2 >= mm.machine.max_map_count - 3:
            return ENOMEM
        if r.flags & MREMAP_FIXED:
            error = do_munmap(mm, r.new_addr, r.new_len, r.event)
            if error:
                return error
        if r.old_len > r.new_len:
            error = do_munmap(mm, (r.addr + r.new_len) & _ULONG_MAX, r.old_len - r.new_len, r.event)
            if error:
                return error
            r.old_len = r.new_len
        area = mm.areas.at(r.addr)
        error = _check_area(r, area)
        if error or area is None:
            return error
        return _place_and_move(r, area)
    if r.old_len >= r.new_len:
        if r.old_len > r.new_len:
            error = do_munmap(mm, (r.addr + r.new_len) & _ULONG_MAX, r.old_len - r.new_len, r.event)
            if error:
                return error
        return r.addr
    error = _check_area(r, area)
    return error or _expand(r, area)


def _new_order(r: _Remap) -> int:
    # From 6.17: do_mremap, check_mremap_params, check_prep_vma.
    mm = r.mm
    if r.new_len > mm.layout.task_size:
        return EINVAL
    if r.to_new_place:
        error = _params_of_new_place(r)
        if error:
            return error
    limit = mm.machine.max_map_count
    exactly = mm.map_count + 4 + (1 if r.flags & MREMAP_DONTUNMAP else 0) > limit
    if _refused(r, exactly, r.to_new_place and mm.map_count + 2 >= limit - 3):
        return ENOMEM
    if r.flags & MREMAP_FIXED and r.old_len == r.new_len and mm.profile.mremap_multi_vma:
        return _move_many(r)
    area = mm.areas.at(r.addr)
    error = _prepare(r, area)
    if error or area is None:
        return error
    if r.to_new_place:
        return _to_new_place(r)
    if r.old_len == r.new_len:
        return r.addr
    if r.old_len > r.new_len:
        error = do_munmap(mm, r.addr + r.new_len, r.old_len - r.new_len, r.event)
        return error or r.addr
    return _expand(r, area)


def _prepare(r: _Remap, area: Area | None) -> int:
    # check_prep_vma.
    if area is None:
        return EFAULT
    if r.old_len >= r.new_len and not r.to_new_place:
        return 0
    saved = r.old_len
    r.old_len = min(r.old_len, r.new_len)
    error = _check_area(r, area, zero=saved == 0)
    r.old_len = saved
    return error


def _check_area(r: _Remap, area: Area | None, *, zero: bool | None = None) -> int:
    # vma_to_resize; the second half of check_prep_vma.
    mm = r.mm
    if area is None:
        return EFAULT
    if (zero if zero is not None else r.old_len == 0) and not area.flags & (VM_SHARED | VM_MAYSHARE):
        return EINVAL
    if r.flags & MREMAP_DONTUNMAP and area.flags & (VM_DONTEXPAND | VM_PFNMAP):
        return EINVAL
    if r.old_len > area.end - r.addr:
        return EFAULT
    if r.new_len == r.old_len:
        return 0
    if area.flags & (VM_DONTEXPAND | VM_PFNMAP):
        return EFAULT
    if area.flags & VM_LOCKED:
        r.populate = True
    delta = r.new_len - r.old_len
    if not mm.mlock_future_ok(area.flags, delta):
        return EAGAIN
    if not mm.may_expand(area.flags, delta >> SHIFT):
        return ENOMEM
    return 0


def _to_new_place(r: _Remap) -> int:
    # mremap_to.
    mm = r.mm
    if r.flags & MREMAP_FIXED:
        error = do_munmap(mm, r.new_addr, r.new_len, r.event)
        if error:
            return error
    if r.old_len > r.new_len:
        error = do_munmap(mm, r.addr + r.new_len, r.old_len - r.new_len, r.event)
        if error:
            return error
        r.old_len = r.new_len
    area = mm.areas.at(r.addr)
    return EFAULT if area is None else _place_and_move(r, area)


def _place_and_move(r: _Remap, area: Area) -> int:
    mm = r.mm
    if r.flags & MREMAP_DONTUNMAP and not mm.may_expand(area.flags, r.old_len >> SHIFT):
        return ENOMEM
    flags = MAP_FIXED if r.flags & MREMAP_FIXED else 0
    if area.flags & VM_MAYSHARE:
        flags |= MAP_SHARED
    hint = r.new_addr if r.to_new_place else 0
    place = get_unmapped_area(mm, area.file, hint, r.new_len, area.pgoff_at(r.addr), flags)
    if place < 0:
        return place
    if not r.flags & MREMAP_FIXED:
        r.new_addr = place
    return _move(r, area)


def _move_many(r: _Remap) -> int:
    # remap_move: every area of the range, gaps kept.
    mm = r.mm
    start, end, target = r.addr, r.addr + r.old_len, r.new_addr
    spans = [(max(a.start, start), min(a.end, end)) for a in mm.areas.overlapping(start, end)]
    if not spans or spans[0][0] > start:
        return EFAULT
    for low, high in spans:
        area = mm.areas.at(low)
        if (
            area is not None
            and area.file is not None
            and area.file.close_hook
            and (low > start or high < end)
        ):
            return EFAULT  # vma_multi_allowed: System V segments choose their own place
        r.addr, r.new_addr = low, target + (low - start)
        r.old_len = r.new_len = high - low
        error = _prepare(r, mm.areas.at(low))
        if error:
            return error
        result = _to_new_place(r)
        if result < 0:
            return result
    return target


def _expand(r: _Remap, area: Area) -> int:
    # expand_vma: in place if the range ends with the area and there is room, else a move.
    mm = r.mm
    delta = r.new_len - r.old_len
    end = area.end
    if (
        area.end - r.addr == r.old_len
        and end + delta <= mm.layout.task_size
        and not mm.areas.overlapping(end, end + delta)
    ):
        pages = delta >> SHIFT
        if area.flags & VM_ACCOUNT and mm.charge(pages):
            return ENOMEM
        grown: Area | None
        if area.close_hook and mm.profile.merge_close_forbids_any:
            # 6.1.9 and later 6.1: grown by itself (vma_adjust), because vma_merge would refuse it.
            mm.areas.resize(area, area.start, end + delta, area.pgoff)
            area.event, grown = r.event, area
        else:
            grown = merge_new(
                mm, end, end + delta, area.flags, area.pgoff_at(end), area.file,
                anon=area.anon_vma, name=area.name, event=r.event,
            )  # fmt: skip
        if grown is None:
            if area.flags & VM_ACCOUNT:
                mm.uncharge(pages)
            return ENOMEM
        mm.stat_account(grown.flags, pages)
        if grown.flags & VM_LOCKED:
            mm.locked_vm += pages
        return r.addr
    if not r.flags & MREMAP_MAYMOVE:
        return ENOMEM
    return _place_and_move(r, area)


def _move(r: _Remap, area: Area) -> int:
    # move_vma.
    mm = r.mm
    keep = bool(r.flags & MREMAP_DONTUNMAP)
    limit = mm.machine.max_map_count
    exactly = mm.map_count + 2 + (1 if keep and area.flags & VM_LOCKED else 0) > limit
    if _refused(r, exactly, mm.map_count >= limit - 3):
        return ENOMEM
    end = r.addr + r.old_len
    if keep and area.flags & VM_LOCKED and mm.profile.dontunmap_pre_split:
        if area.start < r.addr:
            area = split(mm, area, r.addr, r.event)
        if area.end > end:
            split(mm, area, end, r.event)
    pages = (r.new_len if keep else r.new_len - r.old_len) >> SHIFT
    account = area.flags & VM_ACCOUNT
    if account and mm.charge(pages):
        return ENOMEM
    flags = area.flags
    new = _copy_area(r, area, keep)
    source = mm.areas.at(r.addr) if r.old_len else area
    back = _realignment(r, source, new)
    move_tables(mm, r.addr - back, r.new_addr - back, r.old_len + back, r.event)
    if keep and source is not None:
        source.flags &= ~VM_LOCKED_MASK
        if source.start == r.addr and source.end == end:
            unlink_chain(source)
            if source.is_anon and mm.profile.dontunmap_resets_pgoff:
                mm.areas.resize(source, source.start, source.end, source.start >> SHIFT)
        mm.stat_account(flags, r.new_len >> SHIFT)
        if flags & VM_LOCKED and mm.profile.dontunmap_locks_twice:
            mm.locked_vm += r.new_len >> SHIFT
        new.event = r.event
        return r.new_addr
    mm.stat_account(flags, r.new_len >> SHIFT)
    if flags & VM_LOCKED:
        mm.locked_vm += r.new_len >> SHIFT
    if r.old_len:
        hiwater = mm.hiwater_vm
        do_munmap_range(mm, r.addr, end, r.event, uncharge=False)
        mm.hiwater_vm = hiwater
    return r.new_addr


def _refused(r: _Remap, exactly: bool, roughly: bool) -> bool:
    # The test of the vma limit, as this kernel makes it.
    return exactly if exactly == roughly or r.mm.profile.mremap_counts_exactly else roughly


def _realignment(r: _Remap, source: Area | None, new: Area) -> int:
    # try_realign_addr: bytes by which both ends may start earlier, so that a whole table moves at once.
    offset = r.addr & _PMD_MASK
    if not offset or offset != r.new_addr & _PMD_MASK:
        return 0
    if r.old_len < PMD_SIZE - offset or source is None:
        return 0
    for area, addr in ((source, r.addr), (new, r.new_addr)):
        if area.start != addr or r.mm.areas.overlapping(addr - offset, addr):
            return 0
    return offset if r.mm.profile.mremap_realigns else 0


def _copy_area(r: _Remap, area: Area, keep: bool) -> Area:
    # copy_vma: merge with a neighbour of the new place, or a new area.
    mm = r.mm
    pgoff = area.pgoff_at(r.addr)
    end = r.new_addr + r.new_len
    unfaulted = area.is_anon and area.anon_vma is None
    if unfaulted:
        pgoff = r.new_addr >> SHIFT
    apart = unfaulted and keep and not mm.profile.dontunmap_self_merge
    merged = merge_new(
        mm, r.new_addr, end, area.flags, pgoff, area.file, anon=area.anon_vma, copied=area,
        name=area.name, exclude=area if apart else None, event=r.event,
    )  # fmt: skip
    if merged is not None:
        return merged
    new = area.copy(r.event)
    new.start, new.end, new.pgoff = r.new_addr, end, pgoff
    if area.anon_vma is not None:
        new.anon_vma = area.anon_vma
        clone_chain(new, area)
    mm.areas.insert(new)
    return new
