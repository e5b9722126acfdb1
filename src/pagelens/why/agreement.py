"""Agreement: how far the replay and the kernel's last snapshots say the same.

vmas: share of the kernel's vmas (and of ranges that only the replay has) on which range, rights and kind
agree. pages: of anonymous pages that the replay holds present or the kernel shows present, the share that
both do. Null where the capture has no last snapshot. Never rounded up: floor to six digits.

faults and accounting: null. The replay neither predicts faults nor accounts, so there is nothing to compare; what share
of the faults the rules explain is `unknown_share`, which says nothing of the kernel's agreement. `model fuzz` compares
faults of programs that it makes itself.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageState, distinct
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import HPAGE_SIZE
from pagelens.why.calls import area_of
from pagelens.why.classified import Classified
from pagelens.why.evidence import Area
from pagelens.why.files import Files
from pagelens.why.lives import FORK_LINK
from pagelens.why.space import Space

I64 = npt.NDArray[np.int64]


def agreement(result: Classified) -> dict[str, float | None]:
    """{"vmas", "pages", "faults", "accounting"}, shares from 0 to 1 or None."""
    right = total = page_both = page_any = 0
    files = Files(result.facts.settings.get("filesystems"))
    for mm, snapshot in result.facts.last.items():
        space = result.run.spaces.get(mm)
        if space is None or not space.seen:
            continue
        good, of = _vmas(space, snapshot, files)
        right, total = right + good, total + of
        if snapshot.pages is not None:
            both, either = _pages(result, space, snapshot)
            page_both, page_any = page_both + both, page_any + either
    return {
        "vmas": _floor(right, total),
        "pages": _floor(page_both, page_any),
        "faults": None,
        "accounting": None,
    }


def _floor(part: int, whole: int) -> float | None:
    return math.floor(1e6 * part / whole) / 1e6 if whole else None


def _vmas(space: Space, snapshot: Snapshot, files: Files) -> tuple[int, int]:
    right = total = 0
    covered: list[tuple[int, int]] = []
    for vma in snapshot.vmas:
        if vma.name == "[vsyscall]":
            continue
        total += 1
        covered.append((vma.start, vma.end))
        at, good = vma.start, True
        while at < vma.end and good:
            i = space.index(at)
            if i < 0:
                good = False
                break
            seg = space.segs[i]
            state = space.lives.states[seg.state]
            kind = area_of(vma, files)
            same = state.area is kind or {state.area, kind} == {Area.SHMEM, Area.SHARED_FILE}
            good = state.prot == int(vma.prot) and same
            at = seg.end
        right += good
    extra = 0
    for seg in space.segs:
        if space.lives.states[seg.state].name == "[vsyscall]":
            continue
        inside = sum(
            max(0, min(seg.end, b) - max(seg.start, a)) for a, b in covered if a < seg.end and b > seg.start
        )
        extra += inside < seg.end - seg.start
    return right, total + extra


def _pages(result: Classified, space: Space, snapshot: Snapshot) -> tuple[int, int]:
    # Address spaces that inherited pages by fork are left out: what they hold is their parent's history.
    lives = result.run.lives
    segs = [s for s in space.segs if lives.states[s.state].area is Area.ANON]
    if not segs or any(lives.link[_life(lives.key, s.key)] == FORK_LINK for s in segs):
        return 0, 0
    pages = snapshot.pages
    assert pages is not None
    start = np.array([s.start for s in segs], np.int64)
    end = np.array([s.end for s in segs], np.int64)
    key = np.array([s.key for s in segs], np.int64)
    shown = pages.where(PageState.PRESENT).addresses().astype(np.int64)
    shown = shown[_inside(shown, start, end)]
    run = result.run
    lo, hi = np.searchsorted(run.faults.mm, [space.mm, space.mm + 1])
    mine = run.key[lo:hi][~run.faults.failed[lo:hi]]
    by_key = np.argsort(key)
    at = by_key[np.maximum(np.searchsorted(key[by_key], mine, side="right") - 1, 0)]
    step = mine - key[at]
    now = (step >= 0) & (step < (end[at] - start[at]) >> 12)  # lives that have not ended
    held: list[I64] = [distinct(start[at[now]] + (step[now] << 12))]
    first = result.facts.first.get(space.mm)
    for seg in segs:
        state = lives.states[seg.state]
        if state.populated >= 0:
            held.append(np.arange(seg.start, seg.end, 4096, dtype=np.int64))
    if first is not None and first.pages is not None:
        there = first.pages.where(PageState.PRESENT).addresses().astype(np.int64)
        keep = [s for s in segs if lives.seq[_life(lives.key, s.key)] == -1]
        held.append(
            there[
                _inside(
                    there,
                    np.array([s.start for s in keep], np.int64),
                    np.array([s.end for s in keep], np.int64),
                )
            ]
        )
    ours = distinct(np.concatenate(held)) if held else np.empty(0, np.int64)
    huge = pages.where(PageState.HUGE).addresses().astype(np.int64)
    if len(huge):
        blocks = distinct(huge & -HPAGE_SIZE)
        touched = blocks[np.isin(blocks, distinct(ours & -HPAGE_SIZE))]
        ours = distinct(np.concatenate((ours, huge[np.isin(huge & -HPAGE_SIZE, touched)])))
    both = len(np.intersect1d(ours, shown, assume_unique=True))
    return both, len(ours) + len(shown) - both


def _life(keys: list[int], key: int) -> int:
    import bisect

    return bisect.bisect_right(keys, key) - 1


def _inside(addr: I64, start: I64, end: I64) -> npt.NDArray[np.bool_]:
    if not len(start) or not len(addr):
        return np.zeros(len(addr), bool)
    at = np.maximum(np.searchsorted(start, addr, side="right") - 1, 0)
    return np.asarray((addr >= start[at]) & (addr < end[at]), dtype=bool)
