"""Decide, for each page of a held process, whether its contents are stored, referred to, or known without.

Contents are stored for: private anonymous memory and private copies of file pages (present or in swap),
shared memory (once per object, also those of its pages that this process has not touched), writable shared
file mappings, the vDSO. Clean file pages are referred to by path and offset, unless `with_files`. Shared
memory is found through /proc/PID/map_files and SEEK_DATA: reading its holes through the mapping would
allocate them (shmem_fault), and a checkpoint must not change what it saves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagelens.checkpoint.image import ROW, U64, Kind, Rows, compress, per_page
from pagelens.linux.procfs import Process
from pagelens.vm.errors import UsageError
from pagelens.vm.pages import PageRuns, PageState, distinct
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE, AddrRange
from pagelens.vm.vma import Prot, Vma, VmaList

SPECIAL_NAMES = frozenset(("[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"))
_SHMEM_PREFIXES = ("/memfd:", "/SYSV", "/dev/zero (deleted)", "/dev/shm/", "/anon_hugepage", "/i915")


@dataclass(slots=True)
class Plan:
    """rows: ROW runs; those of kind DATA have `block` = -1 and `first` = number of their first page in
    `capture` order. capture_start, capture_pages: runs to read, in that order."""

    rows: Rows
    capture_start: U64
    capture_pages: U64
    notes: list[str] = field(default_factory=list)

    @property
    def pages(self) -> int:
        """Pages to read."""
        return int(self.capture_pages.sum())


def clip(vmas: VmaList, within: AddrRange | None) -> tuple[VmaList, list[tuple[int, int]]]:
    """(vmas cut to the range, holes inside it). UsageError where nothing of it is mapped."""
    if within is None:
        return vmas, []
    kept: list[Vma] = []
    holes: list[tuple[int, int]] = []
    at = within.start
    for vma in vmas.overlapping(within.start, within.end):
        start, end = max(vma.start, within.start), min(vma.end, within.end)
        if start > at:
            holes.append((at, start))
        offset = vma.offset + start - vma.start if vma.inode else vma.offset
        kept.append(vma.replaced(start=start, end=end, offset=offset))
        at = end
    if not kept:
        raise UsageError(f"nothing is mapped in {within}")
    if at < within.end:
        holes.append((at, within.end))
    return VmaList(kept), holes


def is_special(vma: Vma) -> bool:
    """Pages of the kernel or of a device, whose contents are not the process's."""
    flags = vma.vm_flags or frozenset()
    return vma.name in SPECIAL_NAMES or bool(flags & {"io", "pf"})


def is_shared_memory(vma: Vma) -> bool:
    """Shared memory without a file that keeps its contents (memfd, System V, /dev/shm, MAP_SHARED|ANON)."""
    return vma.shared and (vma.name.startswith(_SHMEM_PREFIXES) or (not vma.name and vma.inode != 0))


def is_ring(vma: Vma) -> bool:
    """A ring between process and kernel (io_uring, io_setup): the kernel keeps its own place in it, so its contents
    alone must not go back."""
    return vma.name.startswith(("anon_inode:[io_uring]", "/[aio]"))


def _kinds(vmas: VmaList, owner: np.ndarray, state: np.ndarray, with_files: bool) -> np.ndarray:
    # Kind of each run. PageState.FILE says page cache or shared memory; its absence, a private copy. All vmas at
    # once: one by one costs a tenth of a millisecond each, while the process is held.
    def of_vma(test: Callable[[Vma], object]) -> Any:
        return np.array([bool(test(v)) for v in vmas], bool)[owner]

    def has(bit: PageState) -> Any:
        return (state & np.uint32(bit)) != 0

    present, in_vma_file = has(PageState.PRESENT), of_vma(lambda v: v.inode)
    kind = np.where(present | has(PageState.SWAPPED), np.uint8(Kind.DATA), np.uint8(0))
    if not with_files:
        # A writable shared one: the file will not keep what it says now.
        stored = of_vma(lambda v: is_shared_memory(v) or (v.shared and v.prot & Prot.WRITE))
        kind[present & has(PageState.FILE) & in_vma_file & ~stored] = Kind.FILE
    kind[has(PageState.ZERO) & present & ~in_vma_file] = Kind.ZERO
    kind[has(PageState.GUARD)] = Kind.GUARD
    special = of_vma(is_special)
    kind[special] = np.where(present[special], np.uint8(Kind.SPECIAL), np.uint8(0))
    return kind


def make(proc: Process, vmas: VmaList, pages: PageRuns, *, with_files: bool = False) -> Plan:
    """The plan for a held process. `pages` covers `vmas`."""
    notes: list[str] = []
    start, count, state, owner = split(pages, vmas)
    rows = np.zeros(len(start), ROW)
    rows["start"], rows["pages"], rows["state"] = start, count, state
    rows["block"] = -1
    if len(vmas):
        rows["kind"] = _kinds(vmas, owner, state, with_files)
    bounds = np.searchsorted(owner, np.arange(len(vmas) + 1)).tolist()
    parts: list[Rows] = []
    objects: dict[tuple[str, int], list[tuple[Vma, Rows]]] = {}
    done = 0
    for i, vma in enumerate(vmas):
        if vma.name == "[vdso]" or vma.name.startswith("/[aio]"):
            # Few pages have an entry. Debuggers want all of the one; whether the other has changed must be seen.
            mine = _whole(vma, rows[bounds[i] : bounds[i + 1]])
        elif is_shared_memory(vma):
            mine = _with_object_pages(proc, vma, rows[bounds[i] : bounds[i + 1]], notes)
            objects.setdefault((vma.dev, vma.inode), []).append((vma, mine))
        else:
            continue
        parts += [rows[done : bounds[i]], mine]
        done = bounds[i + 1]
    parts.append(rows[done:])
    memory = np.array([is_shared_memory(v) for v in vmas], bool)
    swapped = int(rows["pages"][((rows["state"] & np.uint32(PageState.SWAPPED)) != 0) & ~memory[owner]].sum())
    if swapped:
        notes.append(f"{swapped} pages were in swap; reading them brought them in")
    all_rows = np.concatenate(parts)
    all_rows = all_rows[all_rows["kind"] != 0]
    data = all_rows["kind"] == Kind.DATA
    alias = {key: group for key, group in objects.items() if len(group) > 1}
    if alias:
        return _with_aliases(all_rows, alias, notes)
    pages_of = np.where(data, all_rows["pages"], 0).astype(np.int64)
    all_rows["first"] = (np.cumsum(pages_of) - pages_of).astype(np.uint32)
    return Plan(all_rows, all_rows["start"][data].copy(), all_rows["pages"][data].copy(), notes)


def _whole(vma: Vma, rows: Rows) -> Rows:
    state = np.zeros(vma.pages, np.uint32)
    flat = per_page(rows)
    state[((flat["start"] - np.uint64(vma.start)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)] = flat["state"]
    out = np.zeros(vma.pages, ROW)
    out["start"] = np.arange(vma.start, vma.end, PAGE_SIZE, dtype=np.uint64)
    out["pages"], out["state"], out["kind"], out["block"] = 1, state, Kind.DATA, -1
    return out


def split(pages: PageRuns, vmas: VmaList) -> tuple[U64, U64, np.ndarray, np.ndarray]:
    """Runs cut at vma boundaries: (start, pages, state, index of the vma); pages outside all vmas dropped."""
    shift = np.uint64(PAGE_SHIFT)
    run_end = pages.start + (pages.count << shift)
    cuts = np.concatenate((vmas.starts, vmas.ends))
    inside = np.searchsorted(pages.start, cuts, side="left").astype(np.int64) - 1
    hit = (inside >= 0) & (cuts < run_end[np.maximum(inside, 0)]) if len(pages) else np.zeros(len(cuts), bool)
    start = distinct(np.concatenate((pages.start, cuts[hit])))
    run = np.searchsorted(pages.start, start, side="right") - 1
    following = np.concatenate((start[1:], np.array([np.iinfo(np.uint64).max], np.uint64)))
    end = np.minimum(following, run_end[run]) if len(pages) else following[:0]
    owner = vmas.find_many(start)
    keep = owner >= 0
    return start[keep], (end[keep] - start[keep]) >> shift, pages.state[run[keep]], owner[keep]


def _with_object_pages(proc: Process, vma: Vma, rows: Rows, notes: list[str]) -> Rows:
    # All pages of the object behind the mapping, also those without a pte here.
    extents = _extents(proc, vma)
    if extents is None:
        missing = vma.pages - int(rows["pages"].sum())
        if missing:
            what = vma.name or "shared memory"
            notes.append(
                f"{missing} pages of {what} at {vma.start:#x} have no page-table entry here; whether the "
                "object holds them cannot be seen (map_files needs CAP_CHECKPOINT_RESTORE; hugetlb and ranges with "
                "minor faults by userfaultfd cannot be asked)"
            )
        return rows
    has = np.zeros(vma.pages, bool)
    for first, last in extents:
        has[first:last] = True
    state = np.zeros(vma.pages, np.uint32)
    flat = per_page(rows)
    at = ((flat["start"] - np.uint64(vma.start)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    state[at] = flat["state"]
    state[(state & np.uint32(PageState.PRESENT)) == 0] &= ~np.uint32(PageState.SWAPPED)
    special = np.zeros(vma.pages, np.uint8)
    special[at] = np.where(flat["kind"] == Kind.DATA, 0, flat["kind"])
    # Not what pagemap calls swapped: of shared memory that is a mark where a page may never have been (write
    # protection puts it there), and what is in swap is among the extents.
    has[at] |= (flat["kind"] == Kind.DATA) & ((flat["state"] & np.uint32(PageState.PRESENT)) != 0)
    kind = np.where(special != 0, special, np.where(has, np.uint8(Kind.DATA), np.uint8(0)))
    keep = np.flatnonzero(kind)
    out = np.zeros(len(keep), ROW)
    out["start"] = np.uint64(vma.start) + (keep.astype(np.uint64) << np.uint64(PAGE_SHIFT))
    out["pages"], out["state"], out["kind"], out["block"] = 1, state[keep], kind[keep], -1
    out["first"] = np.arange(len(keep), dtype=np.uint32)  # so that compress joins neighbours
    return compress(out)


def _opened(proc: Process, vma: Vma) -> int:
    # A descriptor of ours for the object behind a mapping: through map_files (CAP_CHECKPOINT_RESTORE), else one that
    # the process has open itself; -1 where there is neither.
    base = f"/proc/{proc.pid}"
    with contextlib.suppress(OSError):
        return os.open(f"{base}/map_files/{vma.start:x}-{vma.end:x}", os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{base}/fd"):  # noqa: PTH208 - names only
            if os.readlink(f"{base}/fd/{name}") == vma.name:  # noqa: PTH115 - anon_inode:… is no path
                fd = os.open(f"{base}/fd/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                if os.fstat(fd).st_ino == vma.inode:
                    return fd
                os.close(fd)
    return -1


def _extents(proc: Process, vma: Vma) -> list[tuple[int, int]] | None:
    # [first, last) pages of the vma that its object holds, from SEEK_DATA; None where it cannot be asked.
    if {"ht", "ui"} & (vma.vm_flags or frozenset()):
        return None  # hugetlbfs has no SEEK_DATA; a minor fault would wait for a handler that stands still
    fd = _opened(proc, vma)
    if fd < 0:
        return None
    out = []
    base, end = vma.offset, vma.offset + vma.size
    try:
        at = base
        while at < end:
            try:
                first = os.lseek(fd, at, os.SEEK_DATA)
                last = os.lseek(fd, first, os.SEEK_HOLE)
            except OSError:
                break  # ENXIO: no more data
            if first >= end:
                break
            last = min(last, end)
            out.append(((first - base) // PAGE_SIZE, -(-(last - base) // PAGE_SIZE)))
            at = last
    finally:
        os.close(fd)
    return out


def _with_aliases(
    rows: Rows, groups: dict[tuple[str, int], list[tuple[Vma, Rows]]], notes: list[str]
) -> Plan:
    # One object mapped more than once: each of its pages is read through its first mapping only.
    flat = per_page(rows)
    data = np.flatnonzero(flat["kind"] == Kind.DATA)
    source = np.arange(len(data), dtype=np.int64)  # which captured page holds the contents
    addr = flat["start"][data]
    for number, group in enumerate(groups.values()):
        where, key = [], []
        for vma, _ in group:
            lo, hi = np.searchsorted(addr, [np.uint64(vma.start), np.uint64(vma.end)])
            at = np.arange(lo, hi, dtype=np.int64)
            where.append(at)
            key.append(addr[at] - np.uint64(vma.start) + np.uint64(vma.offset))
        positions, keys = np.concatenate(where), np.concatenate(key)
        if not len(positions):
            continue
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        source[positions] = positions[first][inverse]
        shared = len(positions) - len(first)
        if shared:
            notes.append(f"shared object {number}: {shared} pages mapped more than once, stored once")
    read = source == np.arange(len(data))
    order = np.cumsum(read) - 1
    flat["first"][data] = order[source].astype(np.uint32)
    captured = np.zeros(int(read.sum()), ROW)
    captured["start"], captured["pages"] = addr[read], 1
    captured["kind"] = Kind.ZERO  # joined by address alone
    runs = compress(captured)
    return Plan(compress(flat), runs["start"].copy(), runs["pages"].copy(), notes)
