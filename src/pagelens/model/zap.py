"""Taking pages out of an address space (zap_pte_range), and the page tables with them (free_pgtables)."""

from __future__ import annotations

import numpy as np

from pagelens.model.abi import ANON, FRAME_SHIFT, GUARD, SHIFT, SHMEM, SPECIAL, ZERO, D, P
from pagelens.model.area import Area
from pagelens.model.frames import F_DIRTY
from pagelens.model.space import Mm
from pagelens.vm.pages import U64

_P = np.uint64(P)
_ZAPPABLE = np.uint64(P | GUARD)
_NOT_FRAME = np.uint64(ZERO | SPECIAL)
_FRAME = np.uint64(FRAME_SHIFT)


def zap_range(mm: Mm, start: int, end: int, *, event: int, guards: bool = False, cows: bool = True) -> int:
    """Clear the PTEs of [start, end); returns the number of pages that were present.

    guards: clear guard markers too (munmap does, MADV_DONTNEED keeps them; zap_nonpresent_ptes).
    cows: false keeps anonymous pages (unmap_mapping_range with even_cows 0).
    """
    gone = 0
    for _first, chunk, part in mm.tables.spans(start >> SHIFT, end >> SHIFT):
        pte = chunk.pte[part]
        hit = pte
        present = (hit & _P) != 0
        if not cows:
            present &= (hit & np.uint64(ANON)) == 0
        count = int(np.count_nonzero(present))
        if count:
            gone += count
            release(mm, pte[present] if count < len(pte) else pte.copy())
        clear = present
        if guards:
            clear = (hit & _ZAPPABLE) != 0 if cows else present | ((hit & np.uint64(GUARD)) != 0)
        if clear.all():
            pte[:] = 0
            chunk.event[part] = event
        elif clear.any():
            pte[clear] = 0
            chunk.event[part][clear] = event
    if gone:
        mm.tables.flush(start, end, "zap")
    return gone


def release(mm: Mm, pte: U64) -> None:
    """Give up the mappings of these present PTEs: counters, dirty bits of shared pages, frames."""
    frames_of = mm.machine.frames
    plain = pte[(pte & _NOT_FRAME) == 0]
    if not len(plain):
        return
    n_anon = int(np.count_nonzero(plain & np.uint64(ANON)))
    n_shmem = int(np.count_nonzero(plain & np.uint64(SHMEM))) if n_anon < len(plain) else 0
    mm.rss_anon -= n_anon
    mm.rss_shmem -= n_shmem
    mm.rss_file -= len(plain) - n_anon - n_shmem
    frames = (plain >> _FRAME).astype(np.int64)
    if n_anon < len(plain):
        dirty = frames[(plain & np.uint64(ANON | D)) == np.uint64(D)]
        if len(dirty):
            frames_of.flags[dirty] |= F_DIRTY
    frames_of.unmap_many(frames)


def unmap_areas(mm: Mm, areas: list[Area], start: int, end: int, event: int) -> None:
    """unmap_region: the areas are already out of the tree."""
    for area in areas:
        zap_range(mm, area.start, area.end, event=event, guards=True)
    floor, ceiling = mm.next_floor_ceiling(start, end)
    mm.tables.free_tables(areas[0].start, areas[-1].end, floor, ceiling)
