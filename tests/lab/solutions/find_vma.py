from bisect import bisect_right

from pagelens.lab import MiniMm, Vma


def find_vma(mm: MiniMm, addr: int) -> Vma | None:
    at = bisect_right(mm.vmas, addr, key=lambda v: v.end)
    return mm.vmas[at] if at < len(mm.vmas) else None
