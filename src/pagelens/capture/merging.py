"""Which areas the kernel keeps apart: merge and split of the replayed lists (`spaces`), as mm/vma.c judges them.

Rights, flags, file and offset are not enough: two areas that are equal in maps stay two when each has an
anon_vma of its own, and which area has one is decided by its first write fault. Address space layout
randomization decides which mappings touch, so a replay that ignores this is right on one run and wrong on
the next. Faults are in a capture, so the anon_vmas can be followed: `prepare` gives an area one at its first
write (with find_mergeable_anon_vma's look at the neighbours), `insert` and `modify` ask for it.

The model (`model.merge`) has the same rules with all of their consequences; it is not used here because it
replays every page, and a list of areas is wanted in a fraction of that time.

Not in a capture, and taken as equal: whether two mappings of one file came through the same open file, and
the node masks behind a memory policy. See docs/recording.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pagelens.capture.areas import Area, Space, shifted
from pagelens.vm.vma import Prot, Vma

# VM_SPECIAL: VM_IO, VM_DONTEXPAND, VM_PFNMAP, VM_MIXEDMAP.
_SPECIAL = frozenset(("io", "de", "pf", "mm"))
_HUGE = 2 << 20


@dataclass(frozen=True, slots=True)
class Rules:
    """What differs between kernels, and the settings that decide. unfaulted_joins: is_mergeable_anon_vma asks
    vma_is_fork_child (6.16), before that an area without anon_vma joins none that has one. close_forbids: no
    area with vm_ops->close merges (to 6.3), later none that would vanish. next_first: __mmap_region asks the
    next area first (to 6.11). unaccounts: mprotect_fixup drops VM_ACCOUNT of what was never written (6.7).
    stack_nohuge: MAP_STACK means VM_NOHUGEPAGE (6.7). guard_prepares: MADV_GUARD_INSTALL makes an anon_vma
    (6.13 to 6.17). keeps_offset: MREMAP_DONTUNMAP leaves the emptied source its page offset, and lets the
    copy of an unfaulted one merge with it (6.13 to 6.18). unmaps_first: mremap_to unmaps the target before it
    finds that the source has a hole (to 6.16). unlocks_all: MREMAP_DONTUNMAP of a part of a locked vma unlocks all of
    it (prep_move_vma splits it first since 7.0, and in 6.12 stable). thp, overcommit: the settings.
    """

    unfaulted_joins: bool = True
    close_forbids: bool = False
    next_first: bool = False
    unaccounts: bool = True
    stack_nohuge: bool = True
    guard_prepares: bool = False
    keeps_offset: bool = True
    unmaps_first: bool = False
    unlocks_all: bool = True
    thp: str = "madvise"
    overcommit: int = 0


def rules_of(kernel: str, settings: dict[str, Any]) -> Rules:
    """The rules of a capture by the release in its meta.json: a capture cannot be probed any more."""
    release = (0, 0)
    for word in kernel.split():
        parts = word.split(".")
        if len(parts) >= 2 and parts[0].isdigit() and parts[1].split("-")[0].isdigit():
            release = int(parts[0]), int(parts[1].split("-")[0])
            break
    return Rules(
        unfaulted_joins=release >= (6, 16),
        close_forbids=release < (6, 4),
        next_first=release < (6, 12),
        unaccounts=release >= (6, 7),
        stack_nohuge=release >= (6, 7),
        guard_prepares=(6, 13) <= release < (6, 18),
        keeps_offset=(6, 13) <= release < (6, 19),
        unmaps_first=release < (6, 17),
        unlocks_all=release < (6, 12) or (6, 13) <= release < (7, 0),
        thp=str(settings.get("thp") or "madvise"),
        overcommit=int(settings.get("overcommit_memory") or 0),
    )


def insert(space: Space, area: Area, rules: Rules, *, left_only: bool = False) -> None:
    """vma_merge_new_range: put an area where there is none, joined with its neighbours where they merge."""
    i = space.place(area.vma.start)
    before = space.areas[i - 1] if i else None
    after = space.areas[i] if i < len(space.areas) else None
    left = _joins(before, area, rules) and _anon_joins(area.anon, before, None, area, rules)
    right = not left_only and _joins(area, after, rules) and _anon_joins(area.anon, after, None, area, rules)
    if left and right and before is not None and after is not None:
        if rules.next_first:
            left = _anon_joins(after.anon, before, None, None, rules)
        else:
            right = _compatible(before, after) and not _closes(after.vma)
    low, high, joined = i, i, area
    if right and after is not None:
        joined, high = _spanning(after, area.vma.start, after.vma.end, area), i + 1
    if left and before is not None:
        taken = after if right and after is not None else area
        joined, low = _spanning(before, before.vma.start, joined.vma.end, taken), i - 1
        if joined.anon == 0 and area.anon:
            joined = replace(joined, anon=area.anon, forked=area.forked)
    space.set(low, high, [joined])


def modify(
    space: Space, start: int, end: int, change: Callable[[Area], Vma], rules: Rules, *, gaps: bool = True
) -> None:
    """vma_modify over [start, end): `change` gives what each area (cut to the range) becomes; merge first, then
    split front, then tail. gaps: go on behind a hole, as madvise does; else stop there, as mprotect."""
    at = start
    while at < end:
        i = space.after(at)
        if i == len(space.areas) or space.areas[i].vma.start >= end:
            return
        area = space.areas[i]
        if area.vma.start > at:
            if not gaps:
                return
            at = area.vma.start
        stop = min(end, area.vma.end)
        part = _part(area, at, stop)
        new = change(part)
        if (new.prot, new.vm_flags, new.name) != (part.vma.prot, part.vma.vm_flags, part.vma.name):
            _modify_one(space, i, at, stop, replace(part, vma=new), rules)
        at = stop


def _modify_one(space: Space, i: int, start: int, end: int, new: Area, rules: Rules) -> None:
    # vma_merge_existing_range, or the splits. `new` is areas[i] cut to [start, end), changed.
    middle = space.areas[i]
    at_left, at_right = start == middle.vma.start, end == middle.vma.end
    before = space.areas[i - 1] if at_left and i else None
    after = space.areas[i + 1] if at_right and i + 1 < len(space.areas) else None
    left = _joins(before, new, rules) and _anon_joins(middle.anon, before, middle, None, rules)
    right = _joins(new, after, rules) and _anon_joins(middle.anon, after, middle, None, rules)
    if left and right and before is not None and after is not None:
        right = _compatible(before, after)
    if at_left and at_right and _closes(middle.vma):
        left = right = False
    if left and right and after is not None and _closes(after.vma):
        right = False
    if left and before is not None:
        taken = after if right and after is not None and after.anon else middle
        stop = after.vma.end if right and after is not None else end
        rest = [] if at_right else [_part(middle, end, middle.vma.end)]
        joined = _spanning(before, before.vma.start, stop, taken)
        space.set(i - 1, i + 2 if right else i + 1, [joined, *rest])
    elif right and after is not None:
        rest = [] if at_left else [_part(middle, middle.vma.start, start)]
        space.set(i, i + 2, [*rest, _spanning(after, start, after.vma.end, middle)])
    else:
        head = [] if at_left else [_part(middle, middle.vma.start, start)]
        tail = [] if at_right else [_part(middle, end, middle.vma.end)]
        space.set(i, i + 1, [*head, new, *tail])


def prepare(space: Space, i: int) -> None:
    """__anon_vma_prepare: area `i` gets an anon_vma, that of a neighbour which could merge with it but for
    its rights, or a new one."""
    area = space.areas[i]
    if area.anon:
        return
    found = 0
    for j, left, right in ((i + 1, i, i + 1), (i - 1, i - 1, i)):
        if found or not 0 <= j < len(space.areas):
            continue
        other = space.areas[j]
        if other.anon and not other.forked and _alike(space.areas[left], space.areas[right]):
            found = other.anon
    space.areas[i] = replace(area, anon=found or space.new_anon())


def touched(space: Space, addr: int, kind: int, rules: Rules) -> tuple[int, int]:
    """A fault (kind 0: read, 1: write, 2: a write that failed): the stack grows to it, or the area gets its
    anon_vma. Returns the range of addresses whose further faults of that kind change nothing."""
    i = space.index(addr)
    if i < 0:
        i = space.after(addr)
        if kind == 2 or i == len(space.areas) or not _grows(space.areas[i].vma):
            return addr, addr + 1
        area = space.areas[i]
        space.set(i, i + 1, [replace(area, vma=shifted(area.vma, addr & ~4095))])
        prepare(space, i)
    area = space.areas[i]
    # A failed write without the right to it ended before anything was prepared.
    if (
        not area.anon
        and (kind != 2 or area.vma.prot & Prot.WRITE)
        and prepares(area.vma, addr, kind > 0, rules)
    ):
        prepare(space, i)
    if kind or area.anon or area.vma.shared or area.vma.inode:
        return area.vma.start, area.vma.end
    return addr, addr + 1  # a later read may find huge pages possible


def prepares(vma: Vma, addr: int, write: bool, rules: Rules) -> bool:
    """Whether a fault there calls anon_vma_prepare: a write to private memory, or a read where a huge page is
    possible (do_huge_pmd_anonymous_page prepares before it takes the huge zero page)."""
    if vma.shared:
        return False
    if write:
        return True
    flags = vma.vm_flags or frozenset()
    huge = rules.thp == "always" or (rules.thp == "madvise" and "hg" in flags)
    low = addr & ~(_HUGE - 1)
    return huge and "nh" not in flags and not vma.inode and vma.start <= low and low + _HUGE <= vma.end


def forked(space: Space) -> Space:
    """What a fork child has: without DONTFORK ranges, nothing locked; each area that has an anon_vma gets one
    of its own, chained to its parent's (anon_vma_fork)."""
    out = Space()
    out.brk, out.anons = space.brk, space.anons
    kept = []
    for area in space.areas:
        flags = area.vma.vm_flags or frozenset()
        if "dc" in flags:
            continue
        if flags & {"lo", "lf"}:
            area = replace(area, vma=area.vma.replaced(vm_flags=flags - {"lo", "lf"}))  # noqa: PLW2901 (the copy)
        if area.anon:
            area = replace(area, anon=out.new_anon(), forked=True)  # noqa: PLW2901 (the copy)
        kept.append(area)
    out.set(0, 0, kept)
    return out


def _part(area: Area, start: int, end: int) -> Area:
    vma = shifted(area.vma, start) if start > area.vma.start else area.vma
    return replace(area, vma=vma.replaced(end=end))


def _spanning(area: Area, start: int, end: int, taken: Area) -> Area:
    # `area` over [start, end), with the anon_vma of what it swallowed if it had none (dup_anon_vma).
    vma = area.vma
    if start < vma.start and (vma.inode or vma.shared):
        vma = vma.replaced(offset=vma.offset - (vma.start - start))
    area = replace(area, vma=vma.replaced(start=start, end=end))
    if area.anon == 0 and taken.anon:
        area = replace(area, anon=taken.anon, forked=taken.forked)
    return area


def _grows(vma: Vma) -> bool:
    return vma.name == "[stack]" or "gd" in (vma.vm_flags or ())


def _closes(vma: Vma) -> bool:
    # vm_ops->close: System V shared memory has it.
    return vma.name.startswith("/SYSV")


def _name(vma: Vma) -> str:
    # Of anonymous areas only names given by prctl take part; [heap] and [stack] are how maps calls a place.
    return vma.name if vma.inode or vma.shared or vma.name.startswith("[anon") else ""


def _mappable(vma: Vma) -> bool:
    # VM_SPECIAL areas never merge; devices' are, whatever the flags that a capture knows of.
    if vma.name.startswith("[v") or (vma.vm_flags and vma.vm_flags & _SPECIAL):
        return False
    return not vma.name.startswith(("/dev/", "anon_inode:")) or vma.name.startswith(
        ("/dev/shm/", "/dev/zero")
    )


def _contiguous(a: Area, b: Area) -> bool:
    # The same object, and page offsets that go on. Anonymous memory counts from its address, unless it moved.
    left, right = a.vma, b.vma
    if left.end != right.start or left.shared != right.shared:
        return False
    if (left.dev, left.inode, _name(left)) != (right.dev, right.inode, _name(right)):
        return False
    if left.shared and not left.inode and a.made_by != b.made_by:
        return False  # each shared anonymous mapping is an object of its own
    return left.offset + left.size == right.offset if left.inode or left.shared else a.shift == b.shift


def _joins(a: Area | None, b: Area | None, rules: Rules) -> bool:
    # is_mergeable_vma, for neighbours in order.
    if a is None or b is None or not _contiguous(a, b):
        return False
    if a.vma.prot != b.vma.prot or a.vma.vm_flags != b.vma.vm_flags:
        return False
    if rules.close_forbids and (_closes(a.vma) or _closes(b.vma)):
        return False
    return _mappable(a.vma) and _mappable(b.vma)


def _anon_joins(
    source: int, target: Area | None, middle: Area | None, copied: Area | None, rules: Rules
) -> bool:
    # is_mergeable_anon_vma.
    if target is None:
        return False
    if not rules.unfaulted_joins:
        if (not source or not target.anon) and target.anon and not target.forked:
            return True
        return source == target.anon
    if not target.anon and source:
        return not any(a is not None and a.anon and a.forked for a in (middle, copied))
    if target.anon and not source:
        return not target.forked
    return source == target.anon


def _compatible(a: Area, b: Area) -> bool:
    # are_anon_vmas_compatible: both ends of a merge of three.
    return not a.anon or not b.anon or a.anon == b.anon


def _alike(a: Area, b: Area) -> bool:
    # anon_vma_compatible: flags may differ in rights only.
    return _contiguous(a, b) and a.vma.vm_flags == b.vma.vm_flags and _mappable(a.vma) and _mappable(b.vma)
