"""Accesses and populates over ranges, in columns: what `fault` does page by page, many pages an expression.

Anonymous memory goes through numpy; what needs the page cache goes through `fault`, but only for the pages
that fault. The two must agree page for page (tests/model/test_batch.py). Faults come out as runs of equal
error code, each fault with its own event id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagelens.model.abi import (
    AE,
    ANON,
    FRAME_SHIFT,
    GUARD,
    PF_INSTR,
    PF_PROT,
    PF_USER,
    PF_WRITE,
    SD,
    SHIFT,
    SPECIAL,
    VM_EXEC,
    VM_WRITE,
    ZERO,
    A,
    D,
    P,
    W,
)
from pagelens.model.area import Area
from pagelens.model.fault import AccessResult, FaultEvent, anon_prepare, execute_only, touch
from pagelens.model.frames import F_DIRTY
from pagelens.model.space import Mm
from pagelens.model.tables import Chunk
from pagelens.vm.pages import U64

Mask = npt.NDArray[np.bool_]
_FRAME = np.uint64(FRAME_SHIFT)
_P, _W, _A, _AD = np.uint64(P), np.uint64(W), np.uint64(A), np.uint64(A | D)
_NEW = np.uint64(P | A | D | SD | AE | ANON | W)
_REUSED = np.uint64(P | A | D | SD | AE | W)
_ZERO_PAGE = np.uint64(P | A | ZERO)
SMALL = 8  # below so many pages the columns cost more than they save


def access_range(mm: Mm, addr: int, length: int, kind: str, result: AccessResult) -> None:
    """Touch every page of [addr, addr+length) in order; stops at a signal (in result)."""
    at, end = addr >> SHIFT, ((addr + max(length, 1) - 1) >> SHIFT) + 1
    if addr & 4095 or end - at < SMALL:
        stop = end if end - at < SMALL else at + 1
        while at < stop:
            if not touch(mm, max(addr, at << SHIFT), kind, result):
                return
            at += 1
    while at < end:
        area = mm.areas.at(at << SHIFT)
        if area is None:
            if not touch(mm, at << SHIFT, kind, result):
                return
            at += 1
            continue
        stop = min(end, area.end >> SHIFT)
        if not _segment(mm, area, at, stop, kind, result):
            return
        at = stop


def first_guard(pte: U64) -> int:
    """Index of the first guard marker, -1 if there is none."""
    hit = (pte & np.uint64(GUARD)) != 0
    index = int(hit.argmax())
    return index if hit[index] else -1


def _segment(mm: Mm, area: Area, first: int, last: int, kind: str, result: AccessResult) -> bool:
    # Pages [first, last) of one area; false after a signal.
    write = kind == "w"
    allowed = area.flags & VM_WRITE if write else area.flags & VM_EXEC if kind == "x" else area.accessible
    allowed = allowed and (kind == "x" or not execute_only(mm, area))
    if not allowed or last - first < SMALL:
        return all(touch(mm, page << SHIFT, kind, result) for page in range(first, last))
    if not area.is_anon:
        return _file_segment(mm, first, last, kind, result)
    code = PF_USER | (PF_WRITE if write else PF_INSTR if kind == "x" else 0)
    for start, chunk, part in mm.tables.spans(first, last, create=True):
        pte = chunk.pte[part]
        guard = first_guard(pte)
        if guard >= 0:
            stop = part.start + guard
            if stop > part.start:
                anon_pages(mm, area, start, chunk, slice(part.start, stop), write, code, result)
            touch(mm, (start + guard) << SHIFT, kind, result)
            return False
        anon_pages(mm, area, start, chunk, part, write, code, result)
    return True


def anon_pages(
    mm: Mm,
    area: Area,
    first: int,
    chunk: Chunk,
    part: slice,
    write: bool,
    code: int,
    result: AccessResult | None,
) -> int:
    """Access pages of an anonymous area without guards; returns the number of faults.

    result None: the kernel takes the faults itself (populate): no fault events, accessed bits stay.
    """
    pte = chunk.pte[part]
    count = len(pte)
    none = pte == 0
    n_none = int(np.count_nonzero(none))
    if n_none == count:
        mm.tables.ensure_range(first, first + count)
        base = _begin(mm, count, result)
        chunk.event[part] = base if result is None else np.arange(base, base + count, dtype=np.int32)
        if write:
            anon_prepare(mm, area)
            frames = mm.machine.frames.alloc_many(count, area.frame_flags, base, mapcount=1)
            fresh = frames.view(np.uint64)
            fresh <<= _FRAME
            np.bitwise_or(fresh, _NEW, out=pte)
            mm.rss_anon += count
        else:
            chunk.pte[part] = _ZERO_PAGE
        if result is not None:
            result.faults.append(FaultEvent(first << SHIFT, code, count=count, seq=base))
        return count
    if not write:
        return _read_some(mm, first, chunk, part, none, n_none, code, result)
    return _write_some(mm, area, first, chunk, part, none, code, result)


def _begin(mm: Mm, count: int, result: AccessResult | None) -> int:
    # Count faults and take their event ids; faults within a system call belong to its event.
    machine = mm.machine
    process = machine.running
    if process is not None:
        process.min_flt += count
    if result is None:
        machine.gup += count
        return machine.events.current
    return machine.events.next_id(count)


def _read_some(
    mm: Mm,
    first: int,
    chunk: Chunk,
    part: slice,
    none: Mask,
    n_none: int,
    code: int,
    result: AccessResult | None,
) -> int:
    pte = chunk.pte[part]
    if result is not None:
        pte[~none] |= _A
    if n_none:
        mm.tables.ensure_range(first, first + len(pte))
        base = _begin(mm, n_none, result)
        pte[none] = _ZERO_PAGE
        _record(chunk, part, first, none, np.full(len(pte), code, np.int32), base, result)
    return n_none


def _write_some(
    mm: Mm,
    area: Area,
    first: int,
    chunk: Chunk,
    part: slice,
    none: Mask,
    code: int,
    result: AccessResult | None,
) -> int:
    frames_of = mm.machine.frames
    pte = chunk.pte[part]
    read_only = ~none & ((pte & _W) == 0)
    ready = ~(none | read_only)
    if result is not None:
        pte[ready] |= _AD
    else:
        clean = ready & ((pte & np.uint64(D)) == 0)
        if clean.any():
            frames_of.flags[(pte[clean] >> _FRAME).astype(np.int64)] |= F_DIRTY
    faulting = none | read_only
    count = int(np.count_nonzero(faulting))
    if not count:
        return 0
    mm.tables.ensure_range(first, first + len(pte))
    base = _begin(mm, count, result)
    fresh = none
    if read_only.any():
        zero = read_only & ((pte & np.uint64(ZERO)) != 0)
        anon = read_only & ~zero
        old = (pte >> _FRAME).astype(np.int64)
        reuse = anon & (((pte & np.uint64(AE)) != 0) | (frames_of.mapcount[old] == 1))
        copy = anon & ~reuse
        pte[reuse] |= _REUSED
        fresh = none | zero | copy
        mm.rss_anon -= int(np.count_nonzero(copy))
        if copy.any():
            frames_of.unmap_many(old[copy])
            mm.tables.flush(first << SHIFT, (first + len(pte)) << SHIFT, "copy-on-write")
    n_fresh = int(np.count_nonzero(fresh))
    if n_fresh:
        anon_prepare(mm, area)
        frames = frames_of.alloc_many(n_fresh, area.frame_flags, base, mapcount=1)
        entries = frames.view(np.uint64)
        entries <<= _FRAME
        entries |= _NEW
        pte[fresh] = entries
        mm.rss_anon += n_fresh
    codes = np.where(read_only, code | PF_PROT, code).astype(np.int32)
    _record(chunk, part, first, faulting, codes, base, result)
    return count


def _record(
    chunk: Chunk,
    part: slice,
    first: int,
    faulting: Mask,
    codes: npt.NDArray[np.int32],
    base: int,
    result: AccessResult | None,
) -> None:
    # Event ids into the column; faults as runs of consecutive pages with equal code.
    index = np.flatnonzero(faulting)
    if result is None:
        chunk.event[part][index] = base
        return
    chunk.event[part][index] = np.arange(base, base + len(index), dtype=np.int32)
    code = codes[index]
    breaks = np.flatnonzero((np.diff(index) != 1) | (np.diff(code) != 0)) + 1
    starts = np.concatenate(([0], breaks)).tolist()
    stops = [*breaks.tolist(), len(index)]
    for lo, hi in zip(starts, stops, strict=True):
        addr = (first + int(index[lo])) << SHIFT
        result.faults.append(FaultEvent(addr, int(code[lo]), count=hi - lo, seq=base + lo))


def _file_segment(mm: Mm, first: int, last: int, kind: str, result: AccessResult) -> bool:
    # Pages with an entry that allows the access only get their bits; the others fault one by one.
    write = kind == "w"
    mark = _AD if write else _A
    need = np.uint64(P | W if write else P)
    done = first
    for start, chunk, part in mm.tables.spans(first, last, create=True):
        pte = chunk.pte[part]
        for i in np.flatnonzero((pte & need) != need).tolist():
            page = start + i
            if page > done:
                _mark(mm, done, page, mark)
            if not touch(mm, page << SHIFT, kind, result):
                return False
            done = page + 1
    _mark(mm, done, last, mark)
    return True


def _mark(mm: Mm, first: int, last: int, bits: np.uint64) -> None:
    for _start, chunk, part in mm.tables.spans(first, last):
        pte: U64 = chunk.pte[part]
        pte[(pte & np.uint64(P | SPECIAL)) == _P] |= bits
