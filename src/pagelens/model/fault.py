"""One page fault (mm/memory.c), stage by stage, and one access of one page.

`touch` is what the processor does: look at the PTE, and fault until the access goes through or a signal is
due. `handle` is handle_mm_fault. `batch` does the same for whole ranges, and must agree with this module page
for page (tested). No contents are moved; a frame's `born` event says where they came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pagelens.model.abi import (
    AE,
    ANON,
    BUS_ADRERR,
    FRAME_SHIFT,
    GUARD,
    PF_INSTR,
    PF_PK,
    PF_PROT,
    PF_USER,
    PF_WRITE,
    SD,
    SEGV_ACCERR,
    SEGV_MAPERR,
    SEGV_PKUERR,
    SHIFT,
    SHMEM,
    SPECIAL,
    VM_ACCESS,
    VM_EXEC,
    VM_GROWSDOWN,
    VM_LOCKED,
    VM_MAYSHARE,
    VM_PFNMAP,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
    ZERO,
    A,
    D,
    P,
    W,
)
from pagelens.model.area import STACK_GUARD_GAP, AnonVma, Area, attach
from pagelens.model.frames import F_DIRTY
from pagelens.model.placement import MMAP_MIN_ADDR
from pagelens.model.space import Mm

FAULT_AROUND_PAGES = 16  # fault_around_bytes, 64 KiB


@dataclass(slots=True)
class FaultEvent:
    """Faults at count pages from addr on, stride bytes apart; equal in all else."""

    addr: int
    error_code: int
    major: bool = False
    failed: bool = False
    count: int = 1
    stride: int = 4096
    seq: int = 0


@dataclass(slots=True)
class AccessResult:
    """faults: in order. signal: None, 'SEGV' or 'BUS', with si_code and addr of the page that raised it."""

    faults: list[FaultEvent] = field(default_factory=list)
    signal: str | None = None
    si_code: int = 0
    addr: int = 0

    @property
    def minor(self) -> int:
        """Completed minor faults."""
        return sum(f.count for f in self.faults if not f.failed and not f.major)

    @property
    def major(self) -> int:
        """Completed major faults."""
        return sum(f.count for f in self.faults if not f.failed and f.major)


def execute_only(mm: Mm, area: Area) -> bool:
    """vma_is_pkey_exec_only: the processor refuses reads and writes."""
    return area.flags & VM_ACCESS == VM_EXEC and mm.profile.pku


def wants_writenotify(mm: Mm, area: Area) -> bool:
    """vma_wants_writenotify: first writes to a shared mapping must fault."""
    if area.flags & (VM_WRITE | VM_SHARED) != VM_WRITE | VM_SHARED:
        return False
    if area.file is not None and area.file.page_mkwrite:
        return True
    return mm.profile.soft_dirty and not area.flags & VM_SOFTDIRTY


def prot_writable(mm: Mm, area: Area) -> bool:
    """Whether vm_page_prot has the write bit: shared, writable, and no write-notify."""
    return area.flags & (VM_WRITE | VM_SHARED) == VM_WRITE | VM_SHARED and not wants_writenotify(mm, area)


def anon_prepare(mm: Mm, area: Area) -> None:
    """__anon_vma_prepare with find_mergeable_anon_vma: take a compatible neighbour's, or a new one."""
    if area.anon_vma is not None:
        return
    found: AnonVma | None = None
    following = mm.areas.find(area.end)
    if following is not None and _anon_compatible(mm, area, following):
        found = _reusable(following)
    if found is None:
        before = mm.areas.prev(area.start)
        if before is not None and _anon_compatible(mm, before, area):
            found = _reusable(before)
    area.anon_vma = found or AnonVma()
    attach(area, area.anon_vma)
    area.anon_vma.active += 1


def _reusable(area: Area) -> AnonVma | None:
    return area.anon_vma if area.anon_vma is not None and len(area.chain) == 1 else None


def _anon_compatible(mm: Mm, left: Area, right: Area) -> bool:
    # anon_vma_compatible: flags may differ in what mprotect changes.
    mask = ~(VM_ACCESS | mm.merge_ignores)
    return (
        left.end == right.start
        and left.file is right.file
        and not (left.flags ^ right.flags) & mask
        and right.pgoff == left.pgoff + left.pages
    )


def grow_stack(mm: Mm, area: Area, addr: int, event: int) -> bool:
    """expand_downwards: true if the area now reaches down to addr."""
    addr &= ~4095
    if not area.flags & VM_GROWSDOWN or addr < MMAP_MIN_ADDR:
        return False
    before = mm.areas.prev(area.start)
    if (
        before is not None
        and not before.flags & VM_GROWSDOWN
        and before.accessible
        and addr - before.end < STACK_GUARD_GAP
    ):
        return False
    anon_prepare(mm, area)
    grow = (area.start - addr) >> SHIFT
    if grow > area.pgoff or not mm.may_expand(area.flags, grow):
        return False
    if area.end - addr > mm.limits.stack or not mm.mlock_future_ok(area.flags, grow << SHIFT):
        return False
    if mm.charge(grow):
        return False
    if area.flags & VM_LOCKED:
        mm.locked_vm += grow
    mm.stat_account(area.flags, grow)
    mm.areas.resize(area, addr, area.end, area.pgoff - grow)
    area.event = event
    return True


def touch(mm: Mm, addr: int, kind: str, result: AccessResult) -> bool:
    """One user access of the page at addr; false if it raised a signal (in result)."""
    page = addr >> SHIFT
    machine = mm.machine
    tables = mm.tables
    write = kind == "w"
    while True:
        pte = tables.get(page)
        area = mm.areas.find(addr)
        protected = denied = False
        if pte & P and area is not None and area.start <= addr and area.flags & VM_ACCESS:
            protected = True
            denied = kind != "x" and execute_only(mm, area)
            if write:
                allowed = bool(pte & W)
            else:
                allowed = not denied and (kind == "r" or bool(area.flags & VM_EXEC))
            if allowed:
                want = pte | (A | D if write else A)  # the processor knows nothing of soft-dirty
                if want != pte:
                    chunk = tables.chunk(page >> 15)
                    chunk.pte[page & 32767] = want
                return True
        error_code = PF_USER | (PF_PROT if protected else 0) | (PF_PK if denied else 0)
        if write:
            error_code |= PF_WRITE
        elif kind == "x":
            error_code |= PF_INSTR
        event = machine.events.next_id()
        signal, si_code, major = _user_fault(mm, area, addr, error_code, event)
        result.faults.append(FaultEvent(addr, error_code, major, signal is not None, seq=event))
        if signal is not None:
            result.signal, result.si_code, result.addr = signal, si_code, addr
            return False


def _user_fault(
    mm: Mm, area: Area | None, addr: int, error_code: int, event: int
) -> tuple[str | None, int, bool]:
    # do_user_addr_fault: (signal, si_code, major).
    denied = not error_code & PF_INSTR and area is not None and execute_only(mm, area)
    if area is None or (area.start > addr and not grow_stack(mm, area, addr, event)):
        return "SEGV", SEGV_MAPERR, False
    if error_code & PF_WRITE:
        refused = not area.flags & VM_WRITE
    else:
        refused = bool(error_code & PF_PROT) or not area.accessible
    if refused or denied:
        return "SEGV", SEGV_PKUERR if denied else SEGV_ACCERR, False
    outcome = handle(mm, area, addr >> SHIFT, bool(error_code & PF_WRITE), event)
    if outcome == "major":
        mm.machine.count_fault(True)
        return None, 0, True
    if outcome == "minor":
        mm.machine.count_fault(False)
        return None, 0, False
    if outcome == "segv":
        return "SEGV", SEGV_MAPERR, False
    return "BUS", BUS_ADRERR, False


def handle(mm: Mm, area: Area, page: int, write: bool, event: int) -> str:
    """handle_mm_fault: 'minor', 'major', 'bus' or 'segv' (a guard marker)."""
    tables = mm.tables
    tables.ensure_upper(page)
    pte = tables.get(page)
    if not pte & P:
        if pte & GUARD:
            return "segv"
        if area.is_anon:
            _anonymous(mm, area, page, write, event)
            return "minor"
        return _file_fault(mm, area, page, write, event)
    if write and not pte & W:
        return _wp_fault(mm, area, page, pte, event)
    tables.put(page, pte | A | (D | SD if write else 0), event)
    return "minor"


def _anonymous(mm: Mm, area: Area, page: int, write: bool, event: int) -> None:
    # do_anonymous_page.
    mm.tables.ensure(page)
    if not write:
        mm.tables.put(page, P | A | ZERO, event)
        return
    anon_prepare(mm, area)
    _new_anon(mm, area, page, event)
    mm.rss_anon += 1


def _new_anon(mm: Mm, area: Area, page: int, event: int) -> None:
    frames = mm.machine.frames
    frame = frames.alloc(area.frame_flags, event)
    frames.mapcount[frame] = 1
    bits = P | A | D | SD | AE | ANON
    if area.flags & VM_WRITE:
        bits |= W
    mm.tables.put(page, bits | frame << FRAME_SHIFT, event)


def _file_fault(mm: Mm, area: Area, page: int, write: bool, event: int) -> str:
    # do_fault: do_read_fault, do_cow_fault or do_shared_fault.
    file = area.file
    if file is None:
        return _special_fault(mm, area, page, event)
    index = area.pgoff_at(page << SHIFT)
    if not write and fault_around(mm, area, page, index, event):
        return "minor"
    private_write = write and not area.flags & VM_SHARED
    if private_write:
        anon_prepare(mm, area)  # do_cow_fault: before the file is asked, so a fault that fails leaves it
    if index >= file.n_pages:
        return "bus"
    if private_write:
        _, major = file.get_page(index)
        mm.tables.ensure(page)
        _new_anon(mm, area, page, event)
        mm.rss_anon += 1
        return "major" if major else "minor"
    frame, major = file.get_page(index)
    mm.tables.ensure(page)  # finish_fault: a fault that fails installs no table
    map_file_page(mm, area, page, frame, write=write, event=event)
    if write:
        mm.machine.frames.flags[frame] |= F_DIRTY  # fault_dirty_shared_page
    return "major" if major else "minor"


def _special_fault(mm: Mm, area: Area, page: int, event: int) -> str:
    # special_mapping_fault: vvar maps frame numbers (no struct page), the vdso maps pages that all share.
    mm.tables.ensure(page)
    if area.flags & VM_PFNMAP:
        mm.tables.put(page, P | A | SPECIAL, event)
        return "minor"
    frame, _ = mm.machine.kernel_file(area.name).get_page(area.pgoff_at(page << SHIFT))
    map_file_page(mm, area, page, frame, write=False, event=event)
    return "minor"


def map_file_page(mm: Mm, area: Area, page: int, frame: int, *, write: bool, event: int) -> None:
    """set_pte_range for a page of the cache."""
    bits = P | A
    if area.file is not None and area.file.shmem:
        bits |= SHMEM
        mm.rss_shmem += 1
    else:
        mm.rss_file += 1
    if write:
        bits |= D | SD
        if area.flags & VM_WRITE:
            bits |= W
    elif prot_writable(mm, area):
        bits |= W
    mm.machine.frames.mapcount[frame] += 1
    mm.tables.put(page, bits | frame << FRAME_SHIFT, event)


def fault_around(mm: Mm, area: Area, page: int, index: int, event: int) -> bool:
    """do_fault_around, filemap_map_pages: map cached neighbours into empty PTEs; true if `page` was one."""
    file = area.file
    assert file is not None
    if not file.map_pages:
        return False
    # The window starts at the aligned page or where the vma starts, and is 16 pages from there: clamping the
    # start moves the end with it.
    first = max(page & ~(FAULT_AROUND_PAGES - 1), area.start >> SHIFT, page & ~511)
    last = min(first + FAULT_AROUND_PAGES, area.end >> SHIFT, (page & ~511) + 512)
    base = index - page
    limit = file.n_pages
    hit = False
    if not file.shmem and page >> 9 not in mm.tables.pte_tables:
        found = next((i for i in range(base + first, min(base + last, limit)) if file.lookup(i) >= 0), -1)
        if found == limit - 1 and mm.profile.last_page_needs_table:
            return False
    for p in range(first, last):
        i = base + p
        if i >= limit:
            break
        frame = file.lookup(i)
        if frame < 0 or i in file.not_uptodate:
            continue
        mm.tables.ensure(page)  # filemap_map_pmd
        if mm.tables.get(p):
            continue
        map_file_page(mm, area, p, frame, write=False, event=event)
        hit = hit or p == page
    return hit


def unshare(mm: Mm, area: Area, page: int, pte: int, event: int) -> None:
    """do_wp_page with FAULT_FLAG_UNSHARE (gup_must_unshare): a page that is only read by pin, made exclusive.
    A copy stays read-only and clean."""
    frames = mm.machine.frames
    frame = pte >> FRAME_SHIFT
    if frames.mapcount[frame] == 1:
        mm.tables.put(page, pte | AE, event)
        return
    anon_prepare(mm, area)
    new = frames.alloc(area.frame_flags, event)
    frames.mapcount[new] = 1
    mm.tables.put(page, P | A | AE | ANON | pte & SD | new << FRAME_SHIFT, event)
    frames.unmap(frame)
    mm.tables.flush(page << SHIFT, (page + 1) << SHIFT, "unshare")


def _wp_fault(mm: Mm, area: Area, page: int, pte: int, event: int) -> str:
    # do_wp_page.
    frames = mm.machine.frames
    if area.flags & (VM_SHARED | VM_MAYSHARE):
        mm.tables.put(page, pte | W | A | D | SD, event)
        if not pte & SPECIAL:
            frames.flags[pte >> FRAME_SHIFT] |= F_DIRTY
        return "minor"
    if pte & ANON:
        frame = pte >> FRAME_SHIFT
        if pte & AE or frames.mapcount[frame] == 1:
            mm.tables.put(page, pte | W | A | D | SD | AE, event)
            return "minor"
    anon_prepare(mm, area)
    if not pte & ZERO:
        if not pte & ANON:
            if pte & SHMEM:
                mm.rss_shmem -= 1
            else:
                mm.rss_file -= 1
            mm.rss_anon += 1
        _new_anon(mm, area, page, event)
        frames.unmap(pte >> FRAME_SHIFT)
    else:
        mm.rss_anon += 1
        _new_anon(mm, area, page, event)
    mm.tables.flush(page << SHIFT, (page + 1) << SHIFT, "copy-on-write")
    return "minor"
