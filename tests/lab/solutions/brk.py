from pagelens.lab import PAGE, VM, MiniMm, Vma, page_align

HEAP = VM.READ | VM.WRITE | VM.ACCOUNT


def brk(mm: MiniMm, addr: int) -> int:
    if addr < mm.start_brk:
        return mm.brk
    new, old = page_align(addr), page_align(mm.brk)
    if new < old:
        if mm.unmap(new, old):
            return mm.brk
    elif new > old:
        if mm.overlapping(old, new + PAGE):
            return mm.brk
        if len(mm.vmas) > mm.max_map_count:
            return mm.brk
        heap = mm.vma_at(old - 1)
        if (
            heap is not None
            and heap.end > mm.start_brk
            and heap.flags == HEAP
            and not heap.file
            and not heap.fork_child
        ):
            heap.end = new
        else:
            mm.insert(Vma(old, new, HEAP))
    mm.brk = addr
    return addr
