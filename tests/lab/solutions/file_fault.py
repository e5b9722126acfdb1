from pagelens.lab import BUS_ADRERR, MINOR, PAGE, VM, MiniMm, Pte, Vma


def file_fault(mm: MiniMm, vma: Vma, addr: int, write: bool) -> str:
    page = addr // PAGE
    first = vma.start // PAGE
    index = vma.pgoff + page - first
    shared = bool(vma.flags & VM.SHARED)
    old = mm.ptes.get(page)
    if old is not None:
        if shared:
            mm.ptes[page] = Pte(old.frame, writable=True)
        elif mm.is_anon(old.frame) and (old.exclusive or mm.mapcount(old.frame) == 1):
            mm.ptes[page] = Pte(old.frame, writable=True, exclusive=True)
        else:
            mm.anon_prepare(vma)
            mm.ptes[page] = Pte(mm.new_frame(), writable=True, exclusive=True)
            mm.flush_tlb(page * PAGE, (page + 1) * PAGE)
        return MINOR
    if write and not shared:
        mm.anon_prepare(vma)
    if not write:
        around(mm, vma, page)
    if index >= mm.file_pages(vma.file):
        return BUS_ADRERR
    if write:
        if shared:
            mm.ptes[page] = Pte(mm.read_page(vma.file, index), writable=True)
        else:
            mm.ptes[page] = Pte(mm.new_frame(), writable=True, exclusive=True)
        return MINOR
    if page not in mm.ptes:
        writable = bool(shared and vma.flags & VM.WRITE)
        mm.ptes[page] = Pte(mm.read_page(vma.file, index), writable)
    return MINOR


def around(mm: MiniMm, vma: Vma, page: int) -> None:
    first = vma.start // PAGE
    writable = bool(vma.flags & VM.SHARED and vma.flags & VM.WRITE)
    start = max(page // 16 * 16, first, page // 512 * 512)
    for p in range(start, min(start + 16, vma.end // PAGE, page // 512 * 512 + 512)):
        i = vma.pgoff + p - first
        frame = mm.cached(vma.file, i)
        if i < mm.file_pages(vma.file) and frame is not None and p not in mm.ptes:
            mm.ptes[p] = Pte(frame, writable)
