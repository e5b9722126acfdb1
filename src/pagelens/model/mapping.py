"""mmap, munmap and brk (mm/mmap.c, mm/vma.c)."""

from __future__ import annotations

from pagelens.model.abi import (
    EACCES,
    EAGAIN,
    EEXIST,
    EINVAL,
    ENOMEM,
    EOPNOTSUPP,
    EOVERFLOW,
    EPERM,
    MAP_ABOVE4G,
    MAP_ANONYMOUS,
    MAP_DROPPABLE,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_NONBLOCK,
    MAP_NORESERVE,
    MAP_POPULATE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_STACK,
    MAP_SYNC,
    MAP_TYPE,
    MASK,
    PAGE,
    SHIFT,
    U64_MAX,
    VM_ACCESS,
    VM_ACCOUNT,
    VM_DATA_DEFAULT,
    VM_DONTDUMP,
    VM_DROPPABLE,
    VM_GROWSDOWN,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_MAY,
    VM_MAYEXEC,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_NOHUGEPAGE,
    VM_NORESERVE,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_SPECIAL,
    VM_SYNC,
    VM_WIPEONFORK,
    VM_WRITE,
    page_align,
)
from pagelens.model.area import STACK_GUARD_GAP, Area, unlink_chain
from pagelens.model.files import File
from pagelens.model.merge import merge_new, split
from pagelens.model.placement import MMAP_MIN_ADDR, get_unmapped_area
from pagelens.model.space import Mm
from pagelens.model.zap import unmap_areas

# LEGACY_MAP_MASK (include/linux/mman.h): the flags that MAP_SHARED_VALIDATE lets pass for a file whose driver names no
# others. MAP_FIXED_NOREPLACE and MAP_SYNC are none of them.
_LEGACY = 0x7C07_F97F


def do_mmap(
    mm: Mm, addr: int, length: int, prot: int, flags: int, file: File | None, offset: int, event: int
) -> tuple[int, int]:
    """(address or -errno, bytes to populate). offset in bytes."""
    if offset & (PAGE - 1):
        return EINVAL, 0
    pgoff = offset >> SHIFT
    if flags & MAP_ANONYMOUS:
        file = None
        if flags & MAP_HUGETLB:
            return ENOMEM, 0  # hugetlb_acct_memory: the machine of the model has no explicit huge pages
    elif file is None:
        return -9, 0  # EBADF
    elif flags & MAP_HUGETLB:
        return EINVAL, 0  # ksys_mmap_pgoff: not a file of hugetlbfs
    if not length:
        return EINVAL, 0
    if flags & MAP_FIXED_NOREPLACE:
        flags |= MAP_FIXED
    if not flags & MAP_FIXED:
        addr &= MASK
        if addr and addr < MMAP_MIN_ADDR:
            addr = MMAP_MIN_ADDR
    length = page_align(length)
    if not length:
        return ENOMEM, 0
    if pgoff + (length >> SHIFT) > U64_MAX:
        return EOVERFLOW, 0
    if mm.map_count > mm.machine.max_map_count:
        return ENOMEM, 0
    addr = get_unmapped_area(mm, file, addr, length, pgoff, flags)
    if addr < 0:
        return addr, 0
    if flags & MAP_FIXED_NOREPLACE and mm.areas.overlapping(addr, addr + length):
        return EEXIST, 0
    vm = prot & VM_ACCESS | _flag_bits(mm, flags) | mm.def_flags | VM_MAY
    if flags & MAP_LOCKED and not mm.can_do_mlock:
        return EPERM, 0
    if not mm.mlock_future_ok(vm, length):
        return EAGAIN, 0
    kind = flags & MAP_TYPE
    if file is not None:
        known = _LEGACY | (0 if file.shmem else MAP_SYNC)  # FOP_MMAP_SYNC
        unknown = flags & ~known if kind == MAP_SHARED_VALIDATE else 0
        if unknown and not (unknown == MAP_ABOVE4G and mm.profile.above4g_is_known):
            return EOPNOTSUPP, 0
        if kind in (MAP_SHARED, MAP_SHARED_VALIDATE):
            if prot & VM_WRITE and not file.writable:
                return EACCES, 0
            vm |= VM_SHARED | VM_MAYSHARE
            if not file.writable:
                vm &= ~(VM_MAYWRITE | VM_SHARED)
        elif kind != MAP_PRIVATE:
            return EINVAL, 0
        if not file.readable:
            return EACCES, 0
        if file.noexec:
            if vm & 4:
                return EPERM, 0
            vm &= ~VM_MAYEXEC
        if vm & VM_GROWSDOWN:
            return EINVAL, 0
    elif kind == MAP_SHARED:
        if vm & VM_GROWSDOWN:
            return EINVAL, 0
        pgoff = 0
        vm |= VM_SHARED | VM_MAYSHARE
    elif kind == MAP_PRIVATE:
        pgoff = addr >> SHIFT
    elif kind == MAP_DROPPABLE and mm.profile.droppable:
        if flags & (MAP_LOCKED | MAP_HUGETLB) or vm & VM_GROWSDOWN:
            return EINVAL, 0
        vm |= VM_DROPPABLE | VM_NORESERVE | VM_WIPEONFORK | VM_DONTDUMP
        pgoff = addr >> SHIFT
    else:
        return EINVAL, 0
    if flags & MAP_NORESERVE and mm.machine.overcommit != 2:
        vm |= VM_NORESERVE
    result = mmap_region(mm, file, addr, length, vm, pgoff, event)
    if result >= 0 and (vm & VM_LOCKED or flags & (MAP_POPULATE | MAP_NONBLOCK) == MAP_POPULATE):
        return result, length
    return result, 0


def _flag_bits(mm: Mm, flags: int) -> int:
    # calc_vm_flag_bits.
    bits = 0
    if flags & MAP_GROWSDOWN:
        bits |= VM_GROWSDOWN
    if flags & MAP_LOCKED:
        bits |= VM_LOCKED
    if flags & MAP_SYNC:
        bits |= VM_SYNC
    if flags & MAP_STACK and mm.profile.stack_nohugepage and mm.profile.thp:
        bits |= VM_NOHUGEPAGE
    return bits


def mmap_region(mm: Mm, file: File | None, addr: int, length: int, vm: int, pgoff: int, event: int) -> int:
    """mmap_region: make room, charge, merge or make an area."""
    end = addr + length
    pages = length >> SHIFT
    machine = mm.machine
    accountable = (vm & (VM_NORESERVE | VM_SHARED | VM_WRITE)) == VM_WRITE
    if _make_room(mm, addr, end, vm, accountable, event):
        return ENOMEM
    if vm & VM_SYNC and file is not None and not file.shmem:
        # The file system's mmap refuses what is no DAX (daxdev_mapping_supported), when room is made already.
        if accountable:
            mm.uncharge(pages)
        return EOPNOTSUPP
    if accountable:
        vm |= VM_ACCOUNT
    area = None
    if file is not None or not vm & VM_SHARED:
        area = merge_new(mm, addr, end, vm, pgoff, file, by_mmap=True, event=event)
    if area is None:
        if file is None and vm & VM_SHARED:
            # shmem_zero_setup; shmem_acct_size charges shared memory once, for the object.
            charged = 0 if vm & VM_NORESERVE else pages
            if mm.charge(charged):
                return ENOMEM
            file = File(machine, "/dev/zero (deleted)", length, shmem=True)
            file.opens, file.charged = 0, charged
        area = Area(addr, end, vm, pgoff, file, event=event)
        mm.areas.insert(area)
    mm.stat_account(vm, pages)
    if vm & VM_LOCKED:
        if vm & (VM_SPECIAL | VM_DROPPABLE):  # vma_supports_mlock
            area.flags &= ~VM_LOCKED_MASK
        else:
            mm.locked_vm += pages
    if mm.profile.soft_dirty:
        area.flags |= VM_SOFTDIRTY
    return addr


def _make_room(mm: Mm, addr: int, end: int, vm: int, accountable: bool, event: int) -> int:
    # Limits, charge, and the end of what lay there: 0 or ENOMEM.
    pages = (end - addr) >> SHIFT
    doomed = mm.areas.overlapping(addr, end)
    if not doomed:
        return 0 if mm.may_expand(vm, pages) and not (accountable and mm.charge(pages)) else ENOMEM
    if not mm.profile.mmap_gathers_first:
        covered = sum(min(a.end, end) - max(a.start, addr) for a in doomed) >> SHIFT
        if not mm.may_expand(vm, pages - covered) or do_munmap_range(mm, addr, end, event):
            return ENOMEM
        return ENOMEM if accountable and mm.charge(pages) else 0
    doomed = gather(mm, addr, end, event)
    if not doomed or not mm.may_expand(vm, pages - sum(a.pages for a in doomed)):
        return ENOMEM
    accounted = sum(a.pages for a in doomed if a.flags & VM_ACCOUNT)
    if accountable and mm.charge(pages - accounted):
        return ENOMEM
    return do_munmap_range(mm, addr, end, event, uncharge=not accountable)


def do_munmap(mm: Mm, start: int, length: int, event: int) -> int:
    """do_vmi_munmap: 0 or -errno."""
    size = mm.layout.task_size
    if start & (PAGE - 1) or start > size or length > size - start:
        return EINVAL
    end = start + page_align(length)
    if end == start:
        return EINVAL
    return do_munmap_range(mm, start, end, event)


def gather(mm: Mm, start: int, end: int, event: int) -> list[Area]:
    """vms_gather_munmap_vmas: the areas of the range, split at both edges; none where a split would pass
    max_map_count."""
    area = mm.areas.find(start)
    if area is not None and start > area.start:
        if end < area.end and mm.map_count >= mm.machine.max_map_count:
            return []
        split(mm, area, start, event)
    doomed = mm.areas.overlapping(start, end)
    if doomed[-1].end > end:
        split(mm, doomed[-1], end, event)
    return doomed


def do_munmap_range(mm: Mm, start: int, end: int, event: int, *, uncharge: bool = True) -> int:
    """do_vmi_align_munmap: split at both edges, detach, zap, free tables. uncharge: false for a move."""
    area = mm.areas.find(start)
    if area is None or area.start >= end:
        return 0
    doomed = gather(mm, start, end, event)
    if not doomed:
        return ENOMEM
    for area in doomed:
        mm.areas.remove(area)
        mm.stat_account(area.flags, -area.pages)
        if area.flags & VM_LOCKED:
            mm.locked_vm -= area.pages
        if uncharge and area.flags & VM_ACCOUNT:
            mm.uncharge(area.pages)
    unmap_areas(mm, doomed, start, end, event)
    for area in doomed:
        unlink_chain(area)
    return 0


def do_brk(mm: Mm, brk: int, event: int) -> tuple[int, tuple[int, int] | None]:
    """(new break, range to populate or None). On failure the old break, as the system call."""
    old = mm.brk
    if brk < mm.start_brk:
        return old, None
    if (
        mm.limits.data < 1 << 62
        and brk - mm.start_brk + mm.layout.end_data - mm.layout.start_data > mm.limits.data
    ):
        return old, None
    new_end, old_end = page_align(brk), page_align(old)
    if new_end == old_end:
        mm.brk = brk
        return brk, None
    if brk <= old:
        area = mm.areas.find(new_end)
        if area is None or area.start >= old_end:
            return old, None
        if do_munmap_range(mm, new_end, old_end, event):
            return old, None
        mm.brk = brk
        return brk, None
    if new_end > mm.layout.task_size or not mm.mlock_future_ok(mm.def_flags, new_end - old_end):
        return old, None
    following = mm.areas.find(old_end)
    if (
        following is not None
        and following.start < new_end + PAGE + STACK_GUARD_GAP
        and new_end + PAGE > following.start_gap
    ):
        return old, None
    if _brk_flags(mm, old_end, new_end - old_end, event):
        return old, None
    mm.brk = brk
    return brk, (old_end, new_end) if mm.def_flags & VM_LOCKED else None


def _brk_flags(mm: Mm, addr: int, length: int, event: int) -> int:
    # do_brk_flags.
    pages = length >> SHIFT
    flags = VM_DATA_DEFAULT | VM_ACCOUNT | mm.def_flags
    if not mm.may_expand(flags, pages) or mm.map_count > mm.machine.max_map_count:
        return ENOMEM
    if mm.charge(pages):
        return ENOMEM
    before = mm.areas.prev(addr)
    area = None
    if before is not None and before.end == addr and before.end > mm.start_brk:  # vma_prev_limit
        area = merge_new(mm, addr, addr + length, flags, addr >> SHIFT, None, left_only=True, event=event)
    if area is None:
        area = Area(addr, addr + length, flags, addr >> SHIFT, event=event)
        mm.areas.insert(area)
    mm.stat_account(flags, pages)
    if flags & VM_LOCKED:
        mm.locked_vm += pages
    if mm.profile.soft_dirty:
        area.flags |= VM_SOFTDIRTY
    return 0
