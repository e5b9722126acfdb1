import errno

from pagelens.lab import PAGE, TASK_SIZE, MiniMm, page_align


def munmap(mm: MiniMm, start: int, length: int) -> int:
    if start % PAGE or start > TASK_SIZE or length > TASK_SIZE - start or not page_align(length):
        return -errno.EINVAL
    end = start + page_align(length)
    first = mm.vma_at(start)
    if first is not None and first.start < start and first.end > end and len(mm.vmas) >= mm.max_map_count:
        return -errno.ENOMEM
    if first is not None and first.start < start:
        mm.split(first, start)
    last = mm.vma_at(end)
    if last is not None and last.start < end:
        mm.split(last, end)
    for vma in mm.overlapping(start, end):
        mm.vmas.remove(vma)
    for page in mm.ptes:
        if start // PAGE <= page < end // PAGE:
            del mm.ptes[page]
    mm.flush_tlb(start, end)
    return 0
