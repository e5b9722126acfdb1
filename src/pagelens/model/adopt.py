"""Start from what was seen: a `vm.Snapshot` of a live process, or of a capture, becomes a process of the model.

What a snapshot does not say is set to the likeliest, and said in the notes: write bits (an exclusive page of a
writable private area is writable), the sharers of a page that is not exclusive, the sizes of files beyond what is
mapped, where mmap places. Pages of several snapshots that name the same frame share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pagelens.model.abi import (
    AE,
    ANON,
    FRAME_SHIFT,
    GUARD,
    SD,
    SHIFT,
    SHMEM,
    SPECIAL,
    VM_ACCOUNT,
    VM_LOCKED,
    VM_MAY,
    VM_MAYSHARE,
    VM_PFNMAP,
    VM_SHARED,
    VM_WRITE,
    VMFLAG_CODES,
    ZERO,
    A,
    D,
    P,
    W,
)
from pagelens.model.area import Area
from pagelens.model.fault import anon_prepare, prot_writable
from pagelens.model.files import File
from pagelens.model.frames import F_ANON, I64
from pagelens.model.machine import Machine
from pagelens.model.process import Process
from pagelens.model.space import Layout, Limits, Mm
from pagelens.vm import PageState, Snapshot, Vma
from pagelens.vm.pages import U64
from pagelens.vm.units import TASK_SIZE, TASK_SIZE_LA57

_BITS = {code: bit for bit, code in VMFLAG_CODES}
_SHMEM_NAMES = ("/memfd:", "/dev/zero", "/SYSV", "/dev/shm/")
_FRAME = np.uint64(FRAME_SHIFT)


@dataclass(slots=True)
class Adopted:
    """The processes, in the order of the snapshots, and what had to be assumed."""

    processes: list[Process]
    notes: list[str] = field(default_factory=list)


def adopt(machine: Machine, snapshots: Sequence[Snapshot], limits: Limits | None = None) -> Adopted:
    """Processes in the state of the snapshots. The notes say how many pages were assumed or left out."""
    out = Adopted([])
    files: dict[tuple[str, int, str], File] = {}
    frames: dict[int, int] = {}
    for snapshot in snapshots:
        mm = Mm(machine, _layout(snapshot), limits)
        process = Process(machine, mm, snapshot.pid or machine.next_pid())
        event = machine.events.next_id()
        for vma in snapshot.vmas:
            _area(machine, mm, vma, files, event)
        if snapshot.pages is not None:
            _pages(machine, mm, snapshot, frames, event, out.notes)
        mm.hiwater_rss, mm.hiwater_vm = mm.rss, mm.total_vm
        out.processes.append(process)
    machine.events.current = 0
    _sharers(machine, out.notes)
    return out


def _layout(snapshot: Snapshot) -> Layout:
    # Above the window only where there are five levels (gate areas such as [vsyscall] lie beyond user space).
    high = any(TASK_SIZE < vma.start < TASK_SIZE_LA57 for vma in snapshot.vmas)
    layout = Layout(levels=5 if high else 4)
    top = 0
    for vma in snapshot.vmas:
        if vma.name == "[heap]":
            if not layout.brk:
                layout.start_brk = vma.start
            layout.brk = vma.end
        elif vma.name == "[stack]":
            layout.start_stack = vma.end - 8
        elif not vma.name.startswith("[v"):
            top = max(top, vma.end if vma.end <= TASK_SIZE else 0)
    layout.mmap_base = top or layout.mmap_base
    return layout


def _vm_flags(vma: Vma) -> int:
    if vma.vm_flags is not None:
        return sum(_BITS.get(code, 0) for code in vma.vm_flags)
    flags = int(vma.prot) | VM_MAY
    if vma.shared:
        flags |= VM_SHARED | VM_MAYSHARE
    elif flags & VM_WRITE:
        flags |= VM_ACCOUNT
    return flags


def _area(machine: Machine, mm: Mm, vma: Vma, files: dict[tuple[str, int, str], File], event: int) -> None:
    file = None
    if vma.inode or vma.name.startswith("/"):
        key = (vma.dev, vma.inode, vma.name)
        file = files.get(key)
        if file is None:
            shmem = vma.name.startswith(_SHMEM_NAMES)
            file = files[key] = File(machine, vma.name, shmem=shmem, dev=vma.dev, inode=vma.inode)
            machine.files.setdefault(vma.name, file)
        file.size = max(file.size, vma.offset + vma.size)
    pgoff = vma.offset >> SHIFT if file is not None else vma.start >> SHIFT
    if vma.name.startswith("[v"):
        pgoff = 0  # special mappings count their own pages
    name = vma.name if file is None and vma.name.startswith(("[v", "[anon")) else ""
    area = Area(vma.start, vma.end, _vm_flags(vma), pgoff, file, name, event)
    mm.areas.insert(area)
    mm.stat_account(area.flags, area.pages)
    if area.flags & VM_LOCKED:
        mm.locked_vm += area.pages
    if area.flags & VM_ACCOUNT:
        mm.machine.committed += area.pages


def _pages(
    machine: Machine, mm: Mm, snapshot: Snapshot, known: dict[int, int], event: int, notes: list[str]
) -> None:
    pages = snapshot.pages
    assert pages is not None
    left_out = 0
    for index, (start, count, state) in enumerate(pages):
        first, last = start >> SHIFT, (start >> SHIFT) + count
        area = mm.areas.at(start)
        if area is None or (state & PageState.SWAPPED and not state & PageState.GUARD):
            left_out += count
            continue
        pfn = pages.pfn[pages.first[index] : pages.first[index] + count] if pages.pfn is not None else None
        pte = _entries(machine, mm, area, start, count, state, pfn, known, event)
        mm.tables.ensure_range(first, last)
        for begin, chunk, part in mm.tables.spans(first, last, create=True):
            chunk.pte[part] = pte[begin - first : begin - first + part.stop - part.start]
            chunk.event[part] = event
    if left_out:
        notes.append(f"pid {snapshot.pid}: {left_out} swapped or unmapped pages left out")


def _entries(
    machine: Machine,
    mm: Mm,
    area: Area,
    start: int,
    count: int,
    state: PageState,
    pfn: U64 | None,
    known: dict[int, int],
    event: int,
) -> U64:
    # uint64[count]: the entries of one run of equal state.
    if state & PageState.GUARD:
        return np.full(count, GUARD, np.uint64)
    bits = P | A | (SD if state & PageState.SOFT_DIRTY else 0)
    if state & PageState.ZERO:
        return np.full(count, bits | ZERO, np.uint64)
    if area.flags & VM_PFNMAP:
        return np.full(count, bits | SPECIAL, np.uint64)
    if (
        state & PageState.FILE
        or area.name.startswith("[v")
        or (area.file is not None and area.flags & VM_SHARED)
    ):
        frames = _cache_frames(machine, area, start, count)
        shmem = area.file is not None and area.file.shmem
        if shmem:
            bits |= SHMEM | (D if area.flags & VM_WRITE else 0)  # memory that nobody wrote is rare
        if prot_writable(mm, area):
            bits |= W
        if shmem:
            mm.rss_shmem += count
        else:
            mm.rss_file += count
    else:
        anon_prepare(mm, area)
        frames = _anon_frames(machine, count, pfn, known, event)
        bits |= ANON | D
        if state & PageState.EXCLUSIVE:  # mapped once; that it may be written is likely
            bits |= AE | (W if area.flags & VM_WRITE else 0)
        mm.rss_anon += count
    machine.frames.map_many(frames)
    return frames.astype(np.uint64) << _FRAME | np.uint64(bits)


def _cache_frames(machine: Machine, area: Area, start: int, count: int) -> I64:
    file = area.file if area.file is not None else machine.kernel_file(area.name)
    first = area.pgoff_at(start)
    file.make_resident(first, count)
    return file.lookup_many(first, count)


def _anon_frames(machine: Machine, count: int, pfn: U64 | None, known: dict[int, int], event: int) -> I64:
    # Frames by their number in the snapshot, so that processes that share a page share it here.
    if pfn is None or not pfn.any():
        return machine.frames.alloc_many(count, F_ANON, event)
    numbers = pfn.tolist()
    fresh = [n for n in numbers if n not in known]
    known.update(zip(fresh, machine.frames.alloc_many(len(fresh), F_ANON, event).tolist(), strict=True))
    return np.fromiter((known[n] for n in numbers), np.int64, count)


def _sharers(machine: Machine, notes: list[str]) -> None:
    # An anonymous page that is not exclusive has another mapping, maybe in a process that was not seen. It
    # must be copied on the next write, so that mapping counts.
    alone = 0
    for mm in machine.mms():
        for chunk in mm.tables.chunks.values():
            pte = chunk.pte[(chunk.pte & np.uint64(P | ANON | AE)) == np.uint64(P | ANON)]
            frames = (pte >> _FRAME).astype(np.int64)
            single = frames[machine.frames.mapcount[frames] == 1]
            if len(single):
                machine.frames.map_many(single)
                machine.foreign.update(dict.fromkeys(single.tolist(), 1))
                alone += len(single)
    if alone:
        notes.append(f"{alone} shared pages whose other user was not seen: counted as mapped twice")
