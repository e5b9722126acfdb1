"""move_page_tables (mm/mremap.c): page-table entries go from one place to another, without a fault.

It stands apart from `remap` because it knows nothing of areas: only entries, and the table pages that hold
them. A whole aligned table moves as it is; single entries become soft-dirty on the way.
"""

from __future__ import annotations

import numpy as np

from pagelens.model.abi import PMD_SIZE, SD, SHIFT
from pagelens.model.space import Mm

_PMD_MASK = PMD_SIZE - 1


def move_tables(mm: Mm, old: int, new: int, length: int, event: int) -> None:
    """move_page_tables: entries move and become soft-dirty; a whole aligned table moves as it is."""
    tables = mm.tables
    at, end = old, old + length
    while at < end:
        to = new + (at - old)
        extent = min((at | _PMD_MASK) + 1 - at, end - at, (to | _PMD_MASK) + 1 - to)
        number = at >> 21
        if at >> 30 in tables.pmd_tables:
            # get_old_pud, alloc_new_pud: a table above for the target, even where nothing moves under it.
            tables.pud_tables.add(to >> 39)
            if tables.levels == 5:
                tables.p4d_tables.add(to >> 48)
        if number in tables.pte_tables:
            target = to >> 21
            whole = extent == PMD_SIZE and target not in tables.pte_tables
            tables.ensure(to >> SHIFT)
            _move_entries(mm, at >> SHIFT, to >> SHIFT, extent >> SHIFT, event, whole)
            if whole:
                tables.pte_tables.discard(number)
        at += extent
    tables.flush(old, end, "mremap")


def _move_entries(mm: Mm, source: int, target: int, count: int, event: int, whole: bool) -> None:
    chunk = mm.tables.chunks.get(source >> 15)
    if chunk is None:
        return
    base = source & 32767
    pte = chunk.pte[base : base + count]
    if not pte.any():
        return
    moved = pte.copy()
    if not whole and mm.profile.soft_dirty:
        moved[moved != 0] |= np.uint64(SD)  # move_soft_dirty_pte: guard markers too
    events = np.where(moved != 0, event, 0)
    chunk.event[base : base + count][pte != 0] = event
    pte[:] = 0
    into = mm.tables.chunk(target >> 15)
    base = target & 32767
    into.pte[base : base + count] = moved
    into.event[base : base + count] = events
