from pagelens.lab import MINOR, PAGE, PF_WRITE, SEGV_MAPERR, ZERO_FRAME, Pte


def fault(mm, addr, error_code):
    for vma in mm.vmas:
        if vma.start <= addr <= vma.end:
            break
    else:
        return SEGV_MAPERR
    page = addr // PAGE
    if page in mm.ptes:
        mm.flush_tlb(page * PAGE, page * PAGE + PAGE)
    mm.ptes[page] = Pte(ZERO_FRAME)
    if error_code & PF_WRITE:
        mm.anon_prepare(vma)
        mm.ptes[page] = Pte(mm.new_frame(), writable=True, exclusive=True)
    return MINOR
