import errno

from pagelens.lab import (
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PAGE,
    VM,
    MiniMm,
    Vma,
    page_align,
)


def place(mm: MiniMm, addr: int, length: int, flags: int) -> int:
    if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
        return addr
    addr = addr // PAGE * PAGE
    if addr and not mm.overlapping(addr, addr + length):
        return addr
    top = mm.mmap_base
    for vma in reversed(mm.vmas):
        if vma.end <= top - length:
            break
        top = min(top, vma.start)
    return top - length


def mergeable(vma: Vma | None, flags: VM) -> bool:
    return vma is not None and vma.flags == flags and not vma.file and not vma.fork_child


def mmap(mm: MiniMm, addr: int, length: int, prot: int, flags: int) -> int:
    if not length:
        return -errno.EINVAL
    length = page_align(length)
    if len(mm.vmas) > mm.max_map_count:
        return -errno.ENOMEM
    addr = place(mm, addr, length, flags)
    if addr % PAGE:
        return -errno.EINVAL
    end = addr + length
    if flags & MAP_FIXED_NOREPLACE and mm.overlapping(addr, end):
        return -errno.EEXIST
    if flags & 3 != MAP_PRIVATE:
        return -errno.EINVAL
    if mm.unmap(addr, end):
        return -errno.ENOMEM
    vm = VM(prot)
    if flags & MAP_NORESERVE:
        vm |= VM.NORESERVE
    elif vm & VM.WRITE:
        vm |= VM.ACCOUNT
    before, behind = mm.vma_at(addr - 1), mm.vma_at(end)
    left, right = mergeable(before, vm), mergeable(behind, vm)
    if left and right and before.anon_vma != behind.anon_vma and behind.anon_vma:
        if "mmap_merges_right_first" in mm.rules:
            left = False
        elif before.anon_vma:
            right = False
    if left and right:
        before.end = behind.end
        before.anon_vma = before.anon_vma or behind.anon_vma
        mm.vmas.remove(behind)
    elif left:
        before.end = end
    elif right:
        behind.start = addr
    else:
        mm.insert(Vma(addr, end, vm))
    return addr
