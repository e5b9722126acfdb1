import errno

from pagelens.lab import PAGE, VM, MiniMm, page_align


def dontneed(mm: MiniMm, start: int, length: int) -> int:
    if start % PAGE:
        return -errno.EINVAL
    end = start + page_align(length)
    result, at = 0, start
    while at < end:
        vma = mm.find_vma(at)
        if vma is None:
            return -errno.ENOMEM
        if vma.start > at:
            result = -errno.ENOMEM
            at = vma.start
            if at >= end:
                break
        if vma.flags & VM.LOCKED:
            return -errno.EINVAL
        stop = min(vma.end, end)
        for page in range(at // PAGE, stop // PAGE):
            mm.ptes.pop(page, None)
        mm.flush_tlb(at, stop)
        at = stop
    return result
