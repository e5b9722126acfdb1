"""Pages that are present and that kpagecount counts 0 times: which, and why.

kpagecount shows a frame's reverse mappings. A page-table entry without one is no mistake: the kernel does
not count mappings of the zero page (it would be the most contended counter of the machine), nor of frames
that a driver or the kernel maps by number (VM_PFNMAP, vm_insert_pfn: vvar, device memory, perf's ring),
because they are never reclaimed. Sources: mm/rmap.c, mm/memory.c (vm_normal_page, insert_pfn),
fs/proc/page.c (kpagecount_read).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagelens.vm.pages import PageRuns, PageState
from pagelens.vm.regions import Region
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.vma import Vma

KPF_HUGE, KPF_NOPAGE, KPF_KSM, KPF_THP, KPF_ZERO, KPF_RESERVED = 17, 20, 21, 22, 24, 32


@dataclass(frozen=True, slots=True)
class Uncounted:
    """A run of present pages of one vma with count 0 (or no count), and the reason. known: a rule decided
    it."""

    start: int
    pages: int
    pfn: int
    region: str
    reason: str
    why: str
    known: bool
    evidence: str


def find(shot: Snapshot, regions: Sequence[Region]) -> list[Uncounted]:
    """All of them in a snapshot with frames. ValueError without frames."""
    runs = shot.pages
    if runs is None or runs.mapcount is None or runs.kflags is None or runs.pfn is None:
        raise ValueError("a snapshot without frames")
    addr, state = runs.addresses(), runs.states()
    present = (state & np.uint32(PageState.PRESENT)) != 0
    hit = np.flatnonzero(present & (runs.mapcount <= 0) & (runs.pfn != 0))
    if not len(hit):
        return []
    starts = np.array([r.start for r in regions], np.uint64)
    place = np.searchsorted(starts, addr[hit], side="right") - 1
    key = np.stack((state[hit].astype(np.int64), runs.kflags[hit].view(np.int64), place), axis=1)
    breaks = (np.diff(addr[hit]) != 4096) | (np.diff(key, axis=0) != 0).any(axis=1)
    breaks |= np.diff(runs.mapcount[hit]) != 0
    first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    count = np.diff(np.concatenate((first, [len(hit)])))
    out = []
    for i, n in zip(first.tolist(), count.tolist(), strict=True):
        page = int(hit[i])
        region = regions[int(place[i])]
        vma = shot.vmas[region.vma]
        flags, bits = int(runs.kflags[page]), PageState(int(state[page]))
        reason, why, known = classify(bits, flags, int(runs.mapcount[page]), vma)
        evidence = _evidence(bits, flags, vma)
        out.append(
            Uncounted(int(addr[page]), n, int(runs.pfn[page]), region.label, reason, why, known, evidence)
        )
    return out


def classify(state: PageState, kflags: int, mapcount: int, vma: Vma) -> tuple[str, str, bool]:
    """(reason, why in a sentence, whether a rule decided it) of a present page without a count."""
    flags = vma.vm_flags or frozenset()
    if kflags >> KPF_ZERO & 1:
        if state & PageState.HUGE or kflags >> KPF_THP & 1:
            return (
                "huge zero page",
                "a read of huge-page memory that nobody wrote: one shared page of zeros",
                True,
            )
        return (
            "zero page",
            "a read of anonymous memory that nobody wrote: one shared page of zeros, not counted",
            True,
        )
    if mapcount < 0 or kflags >> KPF_NOPAGE & 1:
        return (
            "no page behind it",
            "the frame is no memory of this kernel (a device's), so there is no counter",
            True,
        )
    if vma.name.startswith("[vvar"):
        return "special mapping: vvar", "the kernel's clock data, mapped by frame number on first use", True
    if vma.name.startswith("["):
        return "special mapping", f"{vma.name} is mapped by the kernel itself", True
    if "pf" in flags:
        what = vma.name or "a driver's memory"
        return (
            "mapped by frame number",
            f"{what}: VM_PFNMAP, the owner of the frames keeps them, not the count",
            True,
        )
    if "mm" in flags:
        return "mixed mapping", "VM_MIXEDMAP: this entry is a bare frame number", True
    if "io" in flags or kflags >> KPF_RESERVED & 1:
        return "reserved memory", "not managed by the page allocator", True
    return "unknown", "no rule explains it; the page may have been unmapped while it was read", False


def _evidence(state: PageState, kflags: int, vma: Vma) -> str:
    from pagelens.vm.names import page_flag_names

    flags = " ".join(page_flag_names(kflags)) or "none"
    telling = sorted((vma.vm_flags or frozenset()) & {"pf", "mm", "io", "de"})
    vm_flags = f"; VmFlags {' '.join(telling)}" if telling else ""
    huge = " huge" if state & PageState.HUGE else ""
    return f"frame flags {flags}{huge}{vm_flags}"


def hidden(shot: Snapshot, regions: Sequence[Region]) -> list[Region]:
    """Regions in VM_PFNMAP vmas: what is mapped there cannot be seen in pagemap. Needs VmFlags
    (accounting)."""
    return [r for r in regions if "pf" in (shot.vmas[r.vma].vm_flags or ())]


def counted(runs: PageRuns) -> tuple[int, int]:
    """(present pages with a count of 1 or more, present pages with none)."""
    if runs.mapcount is None:
        return 0, 0
    present = (runs.states() & np.uint32(PageState.PRESENT)) != 0
    return int((present & (runs.mapcount > 0)).sum()), int((present & (runs.mapcount <= 0)).sum())
