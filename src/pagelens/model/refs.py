"""clear_refs (fs/proc/task_mmu.c, clear_refs_write): accessed bits, soft-dirty, the high-water mark."""

from __future__ import annotations

import numpy as np

from pagelens.model.abi import (
    EINVAL,
    GUARD,
    SD,
    SHIFT,
    SPECIAL,
    U64_MAX,
    VM_PFNMAP,
    VM_SOFTDIRTY,
    ZERO,
    A,
    P,
    W,
)
from pagelens.model.space import Mm


def clear_refs(mm: Mm, kind: int, event: int) -> int:
    """1 all, 2 anonymous, 3 mapped files: accessed bits. 4 soft-dirty. 5 VmHWM. Returns 0 or -EINVAL."""
    if not 1 <= kind <= 5:
        return EINVAL
    if kind == 5:
        mm.hiwater_rss = mm.rss
        return 0
    soft = kind == 4
    if soft and not mm.profile.soft_dirty:
        return 0
    clear = np.uint64(~(SD | W if soft else A) & U64_MAX)
    skip = np.uint64(0 if soft else ZERO | SPECIAL)
    if soft:
        for area in mm.areas:
            area.flags &= ~VM_SOFTDIRTY
    for area in mm.areas:
        if area.flags & VM_PFNMAP or (kind == 2 and area.file) or (kind == 3 and area.file is None):
            continue
        for _first, chunk, part in mm.tables.spans(area.start >> SHIFT, area.end >> SHIFT):
            pte = chunk.pte[part]
            hit = ((pte & np.uint64(P | GUARD if soft else P)) != 0) & ((pte & skip) == 0)
            if hit.any():
                pte[hit] &= clear
                chunk.event[part][hit] = event
    mm.tables.flush(0, mm.layout.task_size, "clear_refs")
    return 0
