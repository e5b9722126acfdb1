import errno

from pagelens.lab import PAGE, VM, MiniMm, Pte, Vma, page_align


def suits(mm: MiniMm, vma: Vma, near: Vma) -> bool:
    if vma.anon_vma == near.anon_vma:
        return True
    if "merge_unfaulted_target" in mm.rules:
        return not (vma.anon_vma and near.anon_vma) and not (vma.fork_child or near.fork_child)
    return not vma.anon_vma and bool(near.anon_vma) and not near.fork_child


def together(mm: MiniMm, vma: Vma, near: Vma | None, flags: VM) -> bool:
    if near is None or near.flags != flags or near.file != vma.file:
        return False
    low, high = (near, vma) if near.end == vma.start else (vma, near)
    if vma.file and low.pgoff + low.pages != high.pgoff:
        return False
    return suits(mm, vma, near)


def change(mm: MiniMm, vma: Vma, start: int, end: int, flags: VM) -> Vma | None:
    left = mm.vma_at(start - 1) if start == vma.start else None
    right = mm.vma_at(end) if end == vma.end else None
    to_left, to_right = together(mm, vma, left, flags), together(mm, vma, right, flags)
    if to_left and to_right and left.anon_vma and right.anon_vma and left.anon_vma != right.anon_vma:
        to_right = False
    if to_left and to_right:
        left.end = right.end
        left.anon_vma = left.anon_vma or right.anon_vma or vma.anon_vma
        mm.vmas.remove(vma)
        mm.vmas.remove(right)
        return left
    if to_left:
        left.end = end
        left.anon_vma = left.anon_vma or vma.anon_vma
        if end == vma.end:
            mm.vmas.remove(vma)
        else:
            vma.pgoff += (end - vma.start) // PAGE if vma.file else 0
            vma.start = end
        return left
    if to_right:
        right.pgoff -= (right.start - start) // PAGE if vma.file else 0
        right.start = start
        right.anon_vma = right.anon_vma or vma.anon_vma
        if start == vma.start:
            mm.vmas.remove(vma)
        else:
            vma.end = start
        return right
    if vma.start < start:
        if len(mm.vmas) >= mm.max_map_count:
            return None
        vma = mm.split(vma, start)
    if vma.end > end:
        if len(mm.vmas) >= mm.max_map_count:
            return None
        mm.split(vma, end)
    vma.flags = flags
    return vma


def protect(mm: MiniMm, vma: Vma, start: int, end: int, prot: int) -> int:
    flags = vma.flags & ~(VM.READ | VM.WRITE | VM.EXEC) | VM(prot)
    if flags == vma.flags:
        return 0
    if flags & VM.WRITE:
        if not vma.flags & (VM.ACCOUNT | VM.WRITE | VM.SHARED | VM.NORESERVE):
            flags |= VM.ACCOUNT
    elif "mprotect_unaccounts" in mm.rules and not vma.file and not vma.anon_vma:
        flags &= ~VM.ACCOUNT
    changed = change(mm, vma, start, end, flags)
    if changed is None:
        return -errno.ENOMEM
    shared = bool(flags & VM.SHARED)
    for page in mm.ptes:
        if start <= page * PAGE < end:
            pte = mm.ptes[page]
            writable = bool(flags & VM.WRITE) and (shared or pte.exclusive)
            mm.ptes[page] = Pte(pte.frame, writable, pte.exclusive)
    mm.flush_tlb(start, end)
    return 0


def mprotect(mm: MiniMm, start: int, length: int, prot: int) -> int:
    if start % PAGE:
        return -errno.EINVAL
    end = start + page_align(length)
    at = start
    while at < end:
        vma = mm.vma_at(at)
        if vma is None:
            return -errno.ENOMEM
        stop = min(vma.end, end)
        error = protect(mm, vma, at, stop, prot)
        if error:
            return error
        at = stop
    return 0
