from pagelens.lab import PAGE, VM, MiniMm, Pte


def fork(mm: MiniMm, child: MiniMm) -> None:
    for vma in mm.vmas:
        if vma.flags & VM.DONTCOPY:
            continue
        new = vma.copy(flags=vma.flags & ~VM.LOCKED, fork_child=bool(vma.anon_vma))
        child.vmas.append(new)
        if vma.flags & VM.WIPEONFORK:
            new.anon_vma, new.fork_child = 0, False
            continue
        if not vma.anon_vma:
            continue
        for page in range(vma.start // PAGE, vma.end // PAGE):
            pte = mm.ptes.get(page)
            if pte is None:
                continue
            if not vma.flags & VM.SHARED:
                pte = Pte(pte.frame)
                mm.ptes[page] = pte
            child.ptes[page] = pte
        mm.flush_tlb(vma.start, vma.end)
