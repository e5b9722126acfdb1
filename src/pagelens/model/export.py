"""State as the kernel reports it: maps, pagemap, smaps, status (fs/proc/task_mmu.c), as `vm.Snapshot`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.model.abi import (
    ANON,
    FRAME_SHIFT,
    GUARD,
    SD,
    SHIFT,
    SPECIAL,
    VM_LOCKED,
    VM_LOCKONFAULT,
    VM_MAYSHARE,
    VM_SOFTDIRTY,
    ZERO,
    A,
    D,
    P,
    flag_codes,
    page_align,
)
from pagelens.model.area import Area
from pagelens.model.frames import F_DIRTY
from pagelens.model.space import Mm
from pagelens.model.tables import CHUNK_PAGES
from pagelens.model.world import Key, Span
from pagelens.vm import Accounting, PageRuns, PageState, Prot, Vma, VmaList
from pagelens.vm.accounting import SMAPS_FIELDS
from pagelens.vm.pages import U64

I64 = npt.NDArray[np.int64]
PM_SOFT_DIRTY, PM_EXCLUSIVE, PM_GUARD, PM_FILE, PM_SWAP, PM_PRESENT = (
    1 << bit for bit in (55, 56, 58, 61, 62, 63)
)
_FRAME = np.uint64(FRAME_SHIFT)
_FLAGS = np.uint64((1 << FRAME_SHIFT) - 1)
PSS_SHIFT = 12
_PLAIN, _PRESENT = np.uint64(P | ZERO | SPECIAL), np.uint64(P)


def area_name(mm: Mm, area: Area) -> str:
    """The name that maps prints: path, [heap], [stack], or what the area was given."""
    if area.file is not None:
        return area.file.name
    if area.name:
        return area.name
    # vma_is_initial_heap: strictly overlapping; a neighbour that only touches the heap was named so in 6.1.
    if area.start <= mm.brk and area.end >= mm.start_brk:
        overlaps = area.start < mm.brk and area.end > mm.start_brk
        if overlaps or not mm.profile.heap_name_overlaps:
            return "[heap]"
    start_stack = mm.layout.start_stack
    if start_stack and area.start <= start_stack <= area.end:
        return "[stack]"
    return ""


def _codes(mm: Mm, flags: int) -> frozenset[str]:
    codes = flag_codes(flags)
    if flags & VM_LOCKONFAULT and not mm.profile.smaps_lockonfault:
        codes = codes - {"lf"} | {"??"}
    return codes


def vma_list(mm: Mm) -> VmaList:
    """All areas as vm.Vma. Offsets are those that maps prints: 0 without a file."""
    return VmaList(_vma(mm, area) for area in mm.areas)


def _vma(mm: Mm, area: Area) -> Vma:
    # Most areas stay as they are from one look to the next, so each keeps its last record.
    state = (area.start, area.end, area.flags, area.pgoff, area_name(mm, area))
    if area.shown is not None and area.shown[0] == state:
        return area.shown[1]
    file, flags = area.file, area.flags
    vma = Vma(
        area.start,
        area.end,
        Prot(flags & 7),
        bool(flags & VM_MAYSHARE),
        area.pgoff << SHIFT if file is not None else 0,
        file.dev if file is not None else "00:00",
        file.inode if file is not None else 0,
        state[4],
        _codes(mm, flags),
    )
    area.shown = (state, vma)
    return vma


class Shown:
    """The vmas of an address space as maps shows them, made anew only where something changed since the last look. A
    live comparison looks after every operation, and nearly all areas are as before."""

    def __init__(self, hidden: frozenset[int]) -> None:
        self._hidden = hidden  # starts of areas that are not shown
        self._states: list[tuple[Area, int, int, int, int]] = []
        self._brk = -1, -1
        self._known: dict[tuple[Area, int, int, int, int], Key] = {}
        self._keys: list[Key] = []
        self._soft: tuple[list[Key], Sequence[Span], U64] | None = None

    def keys(self, mm: Mm) -> list[Key]:
        """As `World.keys`."""
        states = mm.areas.states()
        brk = mm.brk, mm.start_brk  # decide who is called [heap]
        if states == self._states and brk == self._brk:
            return self._keys
        if brk != self._brk or len(self._known) > 4096:
            self._known.clear()
        self._states, self._brk = states, brk
        known, hidden = self._known, self._hidden
        self._keys = [known.get(s) or self._key(mm, s) for s in states if s[1] not in hidden]
        return self._keys

    def _key(self, mm: Mm, state: tuple[Area, int, int, int, int]) -> Key:
        area, start, end, flags, pgoff = state
        offset = pgoff << SHIFT if area.file is not None else 0
        key = start, end, flags & 7, bool(flags & VM_MAYSHARE), offset, area_name(mm, area)
        self._known[state] = key
        return key

    def pages(self, mm: Mm, spans: Sequence[Span]) -> U64:
        """As `World.pages`: all spans in the same few numpy calls."""
        pte = np.zeros(sum(n for _, n in spans), np.uint64)
        at = 0
        for start, npages in spans:
            first = start >> SHIFT
            for begin, chunk, part in mm.tables.spans(first, first + npages):
                here = at + begin - first
                pte[here : here + part.stop - part.start] = chunk.pte[part]
            at += npages
        index = pte.nonzero()[0]
        if len(index):
            pte[index] = _encode(mm, pte[index])
        if mm.profile.soft_dirty:
            pte |= self._soft_dirty(mm, spans)
        return pte

    def _soft_dirty(self, mm: Mm, spans: Sequence[Span]) -> U64:
        # What VM_SOFTDIRTY of the areas adds; it changes with them only.
        keys = self.keys(mm)
        if self._soft is None or self._soft[0] is not keys or self._soft[1] is not spans:
            out = np.concatenate([_soft_dirty(mm, *span) for span in spans] or [np.empty(0, np.uint64)])
            self._soft = keys, spans, out
        return self._soft[2]


def _soft_dirty(mm: Mm, start: int, npages: int) -> U64:
    out = np.zeros(npages, np.uint64)
    first, end = start >> SHIFT, start + (npages << SHIFT)
    for area in mm.areas.overlapping(start, end):
        if area.flags & VM_SOFTDIRTY:
            lo, hi = max(area.start, start) >> SHIFT, min(area.end, end) >> SHIFT
            out[lo - first : hi - first] = np.uint64(PM_SOFT_DIRTY)
    return out


def pagemap(mm: Mm, start: int, npages: int) -> U64:
    """uint64[npages] in the kernel's encoding (pte_to_pagemap_entry, pagemap_pte_hole)."""
    first = start >> SHIFT
    end = start + (npages << SHIFT)
    out = _soft_dirty(mm, start, npages) if mm.profile.soft_dirty else np.zeros(npages, np.uint64)
    for begin, chunk, part in mm.tables.spans(first, end >> SHIFT):
        index = np.flatnonzero(chunk.pte[part])
        if len(index):
            out[index + (begin - first)] |= _encode(mm, chunk.pte[part][index])
    return out


@lru_cache(maxsize=16)
def _entries(soft_dirty: bool, zero_frame: int) -> U64:
    # What pagemap shows for each combination of the model's PTE flags, exclusive as if mapped once.
    flags = np.arange(1 << FRAME_SHIFT, dtype=np.uint64)
    out = np.zeros(len(flags), np.uint64)

    def put(bits: int, needs: int, without: int = 0) -> None:
        out[(flags & np.uint64(needs | without)) == np.uint64(needs)] |= np.uint64(bits)

    put(PM_PRESENT, P)
    put(PM_FILE, P, ZERO | SPECIAL | ANON)
    put(PM_EXCLUSIVE, P, ZERO | SPECIAL)
    put(zero_frame, ZERO)
    if soft_dirty:
        put(PM_SOFT_DIRTY, SD)  # of guard markers too: they carry it as swap entries do
    # pte_to_pagemap_entry: whatever is there and not present reads as swapped, guard markers too.
    put(PM_SWAP, GUARD)
    return out


def _encode(mm: Mm, pte: U64) -> U64:
    # By table: a shift for each bit took most of the time of a live comparison.
    profile = mm.profile
    table = _entries(profile.soft_dirty, mm.machine.zero_frame)
    out = table[(pte & _FLAGS).view(np.int64)]
    frames = pte >> _FRAME
    several = mm.machine.frames.mapcount[frames.view(np.int64)] != 1
    out &= ~(several.astype(np.uint64) << np.uint64(56))
    out |= frames
    guard = (pte & np.uint64(GUARD)) != 0
    if guard.any() and profile.pagemap_guard_bit:
        out[guard] |= np.uint64(PM_GUARD)
    return out


def page_runs(mm: Mm) -> PageRuns:
    """Every page that has an entry, with PageState; frames and map counts beside."""
    addrs, states, pfns, counts = [], [], [], []
    soft_dirty = mm.profile.soft_dirty
    for area in mm.areas:
        soft = bool(soft_dirty and area.flags & VM_SOFTDIRTY)
        for begin, chunk, part in mm.tables.spans(area.start >> SHIFT, area.end >> SHIFT):
            pte = chunk.pte[part]
            index = np.flatnonzero(pte)
            if not len(index):
                continue
            entry = pte[index]
            raw = _encode(mm, entry)
            state = np.zeros(len(entry), np.uint32)
            for bit, value in (
                (PM_PRESENT, PageState.PRESENT),
                (PM_FILE, PageState.FILE),
                (PM_EXCLUSIVE, PageState.EXCLUSIVE),
                (PM_SOFT_DIRTY, PageState.SOFT_DIRTY),
                (PM_GUARD, PageState.GUARD),
            ):
                state[(raw & np.uint64(bit)) != 0] |= np.uint32(value)
            if soft:
                state |= np.uint32(PageState.SOFT_DIRTY)
            state[(entry & np.uint64(ZERO)) != 0] |= np.uint32(PageState.ZERO)
            frames = (entry >> _FRAME).astype(np.int64)
            mapcount = mm.machine.frames.mapcount[frames].astype(np.int64)
            mapcount[(entry & np.uint64(ZERO | SPECIAL | GUARD)) != 0] = 0
            addrs.append((index + begin).astype(np.uint64) << np.uint64(SHIFT))
            states.append(state)
            pfns.append(frames.astype(np.uint64))
            counts.append(mapcount)
    if not addrs:
        return PageRuns.empty()
    return PageRuns.from_pages(
        np.concatenate(addrs),
        np.concatenate(states),
        pfn=np.concatenate(pfns),
        mapcount=np.concatenate(counts),
    )


def smaps_fields(mm: Mm) -> tuple[str, ...]:
    """The fields that this kernel prints."""
    return tuple(f for f in SMAPS_FIELDS if f != "KSM" or mm.profile.smaps_ksm)


def accounting(mm: Mm, status: dict[str, int] | None = None) -> Accounting:
    """smaps of every area, in bytes, with the kernel's rounding (whole KiB, PSS in 2^-12 bytes)."""
    fields = smaps_fields(mm)
    areas = list(mm.areas)
    columns, pss, pss_dirty = _smaps(mm, areas)
    rows = np.zeros((len(areas), len(fields)), np.int64)
    for i, name in enumerate(fields):
        if name in columns:
            rows[:, i] = columns[name]
    rollup = dict(zip(fields, rows.sum(axis=0).tolist(), strict=True))
    # smaps_rollup sums before it rounds.
    locked = np.array([bool(a.flags & VM_LOCKED) for a in areas], np.bool_)
    for name, share in (("Pss", pss), ("Pss_Dirty", pss_dirty), ("Locked", pss[locked])):
        rollup[name] = int(_kib(share.sum() >> PSS_SHIFT))
    return Accounting(fields, rows, rollup, dict(status or {}))


def rollup(mm: Mm) -> dict[str, int]:
    """smaps_rollup, in bytes: what is summed before it is rounded, and the shares by kind of page."""
    out = accounting(mm).total
    for name in ("Size", "KernelPageSize", "MMUPageSize"):
        del out[name]
    return out


def _kib(value: I64) -> I64:
    # seq_put_decimal_ull(value >> 10), back in bytes.
    return value >> 10 << 10


_COUNTED = (
    "Rss", "Shared_Clean", "Shared_Dirty", "Private_Clean", "Private_Dirty", "Referenced", "Anonymous", "LazyFree"
)  # fmt: skip


def _smaps(mm: Mm, areas: list[Area]) -> tuple[dict[str, I64], I64, I64]:
    # (fields in bytes, Pss and Pss_Dirty in 2^-12 bytes), int64[area] each: smaps_pte_entry, smaps_account.
    # Many areas in one expression, because most are small, but no more pages at once than a cache holds.
    out = {name: np.zeros(len(areas), np.int64) for name in (*_COUNTED, "Pss", "Pss_Dirty")}
    parts: list[U64] = []
    owners: list[int] = []
    pages = 0
    for i, area in enumerate(areas):
        for _begin, chunk, part in mm.tables.spans(area.start >> SHIFT, area.end >> SHIFT):
            pte = chunk.pte[part]
            plain = pte[(pte & _PLAIN) == _PRESENT]
            if not len(plain):
                continue
            parts.append(plain)
            owners.append(i)
            pages += len(plain)
            if pages >= CHUNK_PAGES // 2:
                _add_smaps(mm, parts, owners, out)
                parts, owners, pages = [], [], 0
    if parts:
        _add_smaps(mm, parts, owners, out)
    pss, pss_dirty = out["Pss"], out["Pss_Dirty"]
    for name in _COUNTED:
        out[name] <<= SHIFT
    page = np.full(len(areas), 4096, np.int64)
    locked = np.array([bool(a.flags & VM_LOCKED) for a in areas], np.bool_)
    out |= {
        "Size": np.array([a.end - a.start for a in areas], np.int64),
        "KernelPageSize": page,
        "MMUPageSize": page,
        "Pss": _kib(pss >> PSS_SHIFT),
        "Pss_Dirty": _kib(pss_dirty >> PSS_SHIFT),
        "Locked": np.where(locked, _kib(pss >> PSS_SHIFT), 0),
    }
    return out, pss, pss_dirty


def _add_smaps(mm: Mm, parts: list[U64], owners: list[int], out: dict[str, I64]) -> None:
    # Adds the present pages of some areas; owners: the area of each part.
    pte = parts[0] if len(parts) == 1 else np.concatenate(parts)
    ends = np.cumsum([len(part) for part in parts])
    starts = ends - [len(part) for part in parts]

    def add(name: str, values: npt.NDArray[Any]) -> None:
        if len(parts) == 1:
            out[name][owners[0]] += values.sum()
            return
        running = np.zeros(len(values) + 1, np.int64)
        values.cumsum(out=running[1:])
        np.add.at(out[name], owners, running[ends] - running[starts])

    frames = mm.machine.frames
    index = (pte >> _FRAME).view(np.int64)
    mapcount = frames.mapcount[index].astype(np.int64)
    anon = (pte & np.uint64(ANON)) != 0
    dirty = ((pte & np.uint64(D)) != 0) | ((frames.flags[index] & F_DIRTY) != 0)
    shared = mapcount >= 2
    share = (4096 << PSS_SHIFT) // np.maximum(mapcount, 1)
    np.add.at(out["Rss"], owners, ends - starts)
    add("Pss", share)
    add("Pss_Dirty", np.where(dirty, share, 0))
    add("Shared_Clean", shared & ~dirty)
    add("Shared_Dirty", shared & dirty)
    add("Private_Clean", ~(shared | dirty))
    add("Private_Dirty", dirty & ~shared)
    add("Referenced", (pte & np.uint64(A)) != 0)
    add("Anonymous", anon)
    add("LazyFree", frames.lazyfree(index) & anon & ~dirty)


def _code(mm: Mm) -> tuple[int, int]:
    # task_mem: bytes of the program's own text, and of other executable mappings.
    layout = mm.layout
    text = page_align(layout.end_code) - (layout.start_code & ~4095)
    text = min(text, mm.exec_vm << SHIFT)
    return text, (mm.exec_vm << SHIFT) - text


def statm(mm: Mm) -> tuple[int, int, int, int, int, int, int]:
    """(size, resident, shared, text, 0, data, 0) in pages: task_statm."""
    layout = mm.layout
    text = (page_align(layout.end_code) - (layout.start_code & ~4095)) >> SHIFT
    data = mm.data_vm + mm.stack_vm
    return mm.total_vm, mm.rss, mm.rss_file + mm.rss_shmem, text, 0, data, 0


def status_fields(mm: Mm) -> dict[str, int]:
    """task_mem (VmPeak … VmPTE) in bytes, and statm's pages in bytes."""
    text, lib = _code(mm)
    return {
        "VmPeak": max(mm.hiwater_vm, mm.total_vm) << SHIFT,
        "VmSize": mm.total_vm << SHIFT,
        "VmLck": mm.locked_vm << SHIFT,
        "VmPin": 0,
        "VmHWM": max(mm.hiwater_rss, mm.rss) << SHIFT,
        "VmRSS": mm.rss << SHIFT,
        "RssAnon": mm.rss_anon << SHIFT,
        "RssFile": mm.rss_file << SHIFT,
        "RssShmem": mm.rss_shmem << SHIFT,
        "VmData": mm.data_vm << SHIFT,
        "VmStk": mm.stack_vm << SHIFT,
        "VmExe": text,
        "VmLib": lib,
        "VmPTE": mm.tables.bytes,
        "VmSwap": 0,
    }
