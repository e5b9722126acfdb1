"""Split and merge of areas (mm/vma.c; mm/mmap.c before 6.12).

Two entry points, as in the kernel since 6.12: `merge_new` for a range that holds no area yet, and `modify`
for a range within one area whose flags change (merge first, then split front and tail). 6.1's vma_merge
reaches the same results by its eight cases, except where the profile's rules say otherwise.
"""

from __future__ import annotations

from pagelens.model.abi import ENOMEM, SHIFT, VM_SPECIAL
from pagelens.model.area import AnonVma, Area, clone_chain, unlink_chain
from pagelens.model.files import File
from pagelens.model.space import Mm


def _is_mergeable(mm: Mm, area: Area, flags: int, file: File | None, name: str) -> bool:
    # is_mergeable_vma.
    if (area.flags ^ flags) & ~mm.merge_ignores:
        return False
    if area.file is not file:
        return False
    if area.close_hook and mm.profile.merge_close_forbids_any:
        return False
    return _anon_name(area.name) == _anon_name(name)


def _anon_name(name: str) -> str:
    # Only names given by PR_SET_VMA_ANON_NAME take part.
    return name if name.startswith("[anon") else ""


def _fork_child(area: Area | None) -> bool:
    # vma_is_fork_child.
    return area is not None and area.anon_vma is not None and len(area.chain) != 1


def _anon_mergeable(
    mm: Mm, source: AnonVma | None, target: Area, middle: Area | None, copied: Area | None
) -> bool:
    # is_mergeable_anon_vma.
    if source is target.anon_vma:
        return True
    if source is not None and target.anon_vma is not None:
        return False
    if not mm.profile.merge_unfaulted_target:
        return len(target.chain) == 1
    if target.anon_vma is None:
        return not (_fork_child(middle) or _fork_child(copied))
    return not _fork_child(target)


def _compatible(left: Area, right: Area) -> bool:
    # are_anon_vmas_compatible: both ends of a three-way merge.
    a, b = left.anon_vma, right.anon_vma
    return a is None or b is None or a is b


def _dup_anon(dst: Area, src: Area) -> None:
    # dup_anon_vma: an extended area takes over the anon_vma of what it swallows.
    if src.anon_vma is not None and dst.anon_vma is None:
        dst.anon_vma = src.anon_vma
        clone_chain(dst, src)


def _drop(mm: Mm, area: Area) -> None:
    mm.areas.remove(area)
    unlink_chain(area)


def merge_new(
    mm: Mm,
    start: int,
    end: int,
    flags: int,
    pgoff: int,
    file: File | None,
    *,
    anon: AnonVma | None = None,
    copied: Area | None = None,
    name: str = "",
    left_only: bool = False,
    exclude: Area | None = None,
    by_mmap: bool = False,
    event: int = 0,
) -> Area | None:
    """vma_merge_new_range: extend a neighbour over [start, end), or None. The range holds no area."""
    if flags & VM_SPECIAL:
        return None
    prev, following = mm.areas.neighbours(start)
    if exclude is not None:
        prev = None if prev is exclude else prev
        following = None if following is exclude else following
    pages = (end - start) >> SHIFT
    left = (
        prev is not None
        and prev.end == start
        and _is_mergeable(mm, prev, flags, file, name)
        and prev.pgoff + prev.pages == pgoff
        and _anon_mergeable(mm, anon, prev, None, copied)
    )
    right = (
        not left_only
        and following is not None
        and following.start == end
        and _is_mergeable(mm, following, flags, file, name)
        and following.pgoff == pgoff + pages
        and _anon_mergeable(mm, anon, following, None, copied)
    )
    if left and right and prev is not None and following is not None:
        if by_mmap and mm.profile.mmap_merges_right_first:
            # 6.1, __mmap_region (mremap goes by vma_merge): the next area is taken first, and the previous must then
            # suit its anon_vma.
            left = _anon_mergeable(mm, following.anon_vma, prev, None, None)
        else:
            right = _compatible(prev, following) and not following.close_hook
    sticky = flags & mm.sticky_flags
    if left and prev is not None:
        if right and following is not None:
            _dup_anon(prev, following)
            sticky |= following.flags & mm.sticky_flags
            new_end = following.end
            _drop(mm, following)
            mm.areas.resize(prev, prev.start, new_end, prev.pgoff)
        else:
            mm.areas.resize(prev, prev.start, end, prev.pgoff)
        if copied is not None:
            _dup_anon(prev, copied)
        prev.flags |= sticky
        prev.event = event
        return prev
    if right and following is not None:
        mm.areas.resize(following, start, following.end, following.pgoff - pages)
        if copied is not None:
            _dup_anon(following, copied)
        following.flags |= sticky
        following.event = event
        return following
    return None


def split(mm: Mm, area: Area, addr: int, event: int) -> Area:
    """__split_vma without the test of the count: area keeps [start, addr), the rest is returned."""
    new = area.copy(event)
    new.start = addr
    new.pgoff = area.pgoff_at(addr)
    if area.anon_vma is not None:
        new.anon_vma = area.anon_vma
        clone_chain(new, area)
    mm.areas.resize(area, area.start, addr, area.pgoff)
    mm.areas.insert(new)
    area.event = event
    return new


def modify(mm: Mm, area: Area, start: int, end: int, flags: int, event: int) -> tuple[Area | None, int]:
    """vma_modify: the area that covers [start, end) after merging or splitting, ready to take `flags`.

    Returns (area, flags to set); flags differ from those asked for only by sticky bits of what was merged.
    area is None where a split would pass max_map_count (-ENOMEM).
    """
    merged = _merge_existing(mm, area, start, end, flags, event)
    if merged is not None:
        return merged, flags | merged.flags & mm.sticky_flags
    limit = mm.machine.max_map_count
    if area.start < start:
        if mm.map_count >= limit:
            return None, ENOMEM
        area = split(mm, area, start, event)
    if area.end > end:
        if mm.map_count >= limit:
            return None, ENOMEM
        split(mm, area, end, event)
    area.event = event
    return area, flags


def _merge_existing(mm: Mm, middle: Area, start: int, end: int, flags: int, event: int) -> Area | None:
    # vma_merge_existing_range.
    at_left, at_right = start == middle.start, end == middle.end
    if flags & VM_SPECIAL or not (at_left or at_right):
        return None
    pgoff = middle.pgoff_at(start)
    pages = (end - start) >> SHIFT
    prev = mm.areas.prev(middle.start) if at_left else None
    following = mm.areas.next(middle) if at_right else None
    left = (
        prev is not None
        and prev.end == start
        and _is_mergeable(mm, prev, flags, middle.file, middle.name)
        and prev.pgoff + prev.pages == pgoff
        and _anon_mergeable(mm, middle.anon_vma, prev, middle, None)
    )
    right = (
        following is not None
        and following.start == end
        and _is_mergeable(mm, following, flags, middle.file, middle.name)
        and following.pgoff == pgoff + pages
        and _anon_mergeable(mm, middle.anon_vma, following, middle, None)
    )
    if left and right and prev is not None and following is not None:
        right = _compatible(prev, following)
    if not (left or right):
        return None
    whole = at_left and at_right
    if whole and middle.close_hook:
        return None
    if left and right and following is not None and following.close_hook:
        right = False
    mask = mm.sticky_flags
    sticky = flags & mask
    if left and prev is not None:
        sticky |= prev.flags & mask
    if right and following is not None:
        sticky |= following.flags & mask
    if left and right and prev is not None and following is not None:
        _dup_anon(prev, following if following.anon_vma is not None else middle)
        new_end = following.end
        _drop(mm, middle)
        _drop(mm, following)
        mm.areas.resize(prev, prev.start, new_end, prev.pgoff)
        target = prev
    elif left and prev is not None:
        _dup_anon(prev, middle)
        if whole:
            _drop(mm, middle)
        else:
            mm.areas.resize(middle, end, middle.end, middle.pgoff_at(end))
        mm.areas.resize(prev, prev.start, end, prev.pgoff)
        target = prev
    else:
        assert following is not None
        _dup_anon(following, middle)
        if whole:
            _drop(mm, middle)
        else:
            mm.areas.resize(middle, middle.start, start, middle.pgoff)
        mm.areas.resize(following, start, following.end, following.pgoff - pages)
        target = following
    target.flags |= sticky
    target.event = event
    return target
