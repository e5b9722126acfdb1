"""Where mmap puts a mapping (get_unmapped_area): hint, top-down search, huge-page alignment, fallback."""

from __future__ import annotations

from pagelens.model.abi import (
    EINVAL,
    ENOMEM,
    EPERM,
    MAP_32BIT,
    MAP_FIXED,
    MAP_SHARED,
    MASK,
    PAGE,
    PMD_SIZE,
    SHIFT,
    VM_GROWSDOWN,
    page_align,
)
from pagelens.model.files import File
from pagelens.model.space import Mm
from pagelens.vm.units import TASK_SIZE

MMAP_MIN_ADDR = 0x1_0000  # mmap_min_addr: vm.mmap_min_addr, but no less than CONFIG_LSM_MMAP_MIN_ADDR


def get_unmapped_area(mm: Mm, file: File | None, addr: int, length: int, pgoff: int, flags: int) -> int:
    """__get_unmapped_area: the address, or -ENOMEM, -EINVAL, -EPERM."""
    task_size = mm.layout.task_size
    if length > task_size:
        return ENOMEM
    if file is None:
        pgoff = 0
    profile = mm.profile
    # f_op->get_unmapped_area: shmem and the file systems that align huge pages have one.
    own_method = flags & MAP_SHARED if file is None else file.shmem or file.thp_align
    if (file is not None and not file.shmem and file.thp_align) or (
        not own_method
        and not addr
        and not flags & MAP_FIXED
        and length % PMD_SIZE == 0
        and profile.thp
        and profile.thp_align_anon
        and (file is None or not profile.thp_align_file_test)
    ):
        addr = _thp_area(mm, addr, length, pgoff, flags)
    else:
        addr = _area_topdown(mm, addr, length, flags)
    if addr < 0:
        return addr
    if addr > task_size - length:
        return ENOMEM
    if addr & (PAGE - 1):
        return EINVAL
    if addr < mm.machine.dac_min_addr and not mm.limits.cap_sys_rawio:  # cap_mmap_addr
        return EPERM
    return addr


def _thp_area(mm: Mm, addr: int, length: int, pgoff: int, flags: int) -> int:
    # thp_get_unmapped_area_vmflags, __thp_get_unmapped_area.
    offset = pgoff << SHIFT
    aligned = (offset + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
    if offset + length > aligned and offset + length - aligned >= PMD_SIZE:
        found = _area_topdown(mm, addr, length + PMD_SIZE, flags)
        if found >= 0:
            if found == addr:
                return addr
            sub = (offset - found) & (PMD_SIZE - 1)
            return found + (sub or PMD_SIZE)
    return _area_topdown(mm, addr, length, flags)


def _area_topdown(mm: Mm, addr: int, length: int, flags: int) -> int:
    # arch_get_unmapped_area_topdown (x86).
    if length > mm.layout.task_size:
        return ENOMEM
    if flags & MAP_FIXED:
        return addr
    if not flags & MAP_32BIT:
        if addr:
            addr &= MASK
            if _hint_valid(mm, addr, length):
                area = mm.areas.find(addr)
                if area is None or addr + length <= area.start_gap:
                    return addr
        high = mm.layout.mmap_base + (mm.layout.task_size - TASK_SIZE if addr > TASK_SIZE else 0)
        found = unmapped_area_topdown(mm, length, MMAP_MIN_ADDR, high)
        if found >= 0:
            return found
        low, high = mm.layout.mmap_legacy_base, mm.layout.task_size if addr > TASK_SIZE else TASK_SIZE
    else:
        low, high = 0x4000_0000, 0x8000_0000
    if length > high:
        return ENOMEM
    if addr:
        addr = page_align(addr)
        area = mm.areas.find(addr)
        if addr <= high - length and (area is None or addr + length <= area.start_gap):
            return addr
    return _unmapped_area(mm, length, max(low, MMAP_MIN_ADDR), high)


def _hint_valid(mm: Mm, addr: int, length: int) -> bool:
    # mmap_address_hint_valid: within user space, and not across DEFAULT_MAP_WINDOW.
    return addr <= mm.layout.task_size - length and (addr > TASK_SIZE) == (addr + length > TASK_SIZE)


def unmapped_area_topdown(mm: Mm, length: int, low: int, high: int) -> int:
    """unmapped_area_topdown: the highest gap, guard gaps of stacks respected."""
    while True:
        gap = mm.areas.highest_gap(low, high, length)
        if gap is None:
            return ENOMEM
        top, above = gap
        if above is not None and above.flags & VM_GROWSDOWN and above.start_gap < top:
            high = above.start_gap
            if high <= low:
                return ENOMEM
            continue
        return top - length


def _unmapped_area(mm: Mm, length: int, low: int, high: int) -> int:
    # unmapped_area: bottom-up, the fallback.
    while True:
        gap = mm.areas.lowest_gap(low, high, length)
        if gap is None:
            return ENOMEM
        bottom, above = gap
        if above is not None and above.flags & VM_GROWSDOWN and above.start_gap < bottom + length:
            low = above.end
            continue
        return bottom
