from pagelens.lab import (
    MINOR,
    PAGE,
    PF_PROT,
    PF_WRITE,
    SEGV_ACCERR,
    SEGV_MAPERR,
    VM,
    ZERO_FRAME,
    MiniMm,
    Pte,
)


def fault(mm: MiniMm, addr: int, error_code: int) -> str:
    vma = mm.find_vma(addr)
    if vma is None or vma.start > addr:
        return SEGV_MAPERR
    write = bool(error_code & PF_WRITE)
    if write:
        if not vma.flags & VM.WRITE:
            return SEGV_ACCERR
    elif error_code & PF_PROT or not vma.flags & (VM.READ | VM.WRITE | VM.EXEC):
        return SEGV_ACCERR
    page = addr // PAGE
    old = mm.ptes.get(page)
    if old is None and not write:
        mm.ptes[page] = Pte(ZERO_FRAME)
        return MINOR
    if old is not None and mm.is_anon(old.frame) and (old.exclusive or mm.mapcount(old.frame) == 1):
        mm.ptes[page] = Pte(old.frame, writable=True, exclusive=True)
        return MINOR
    mm.anon_prepare(vma)
    mm.ptes[page] = Pte(mm.new_frame(), writable=True, exclusive=True)
    if old is not None:
        mm.flush_tlb(page * PAGE, page * PAGE + PAGE)
    return MINOR
