"""What a read fault of a file or of shared memory maps around its page (do_fault_around, mm/memory.c), by keys.

The window are 16 pages from an aligned one on, or from where the vma begins, and ends with the vma and the page table.
Where the vma begins and ends the calls do not always tell: the kernel makes one of two neighbours that continue each
other, unless it has reasons not to that nobody records (anon_vma). So there are pages that a read has surely mapped if
the page cache had them, and such as it has perhaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Area

if TYPE_CHECKING:
    from pagelens.why.lives import State
    from pagelens.why.space import Space

WINDOW = 16  # pages: fault_around_bytes
AROUND = (Area.FILE, Area.SHARED_FILE, Area.SHMEM)
_TABLE = 512  # pages of one page table
# By what the kernel keeps vmas apart (is_mergeable_vma).
_KEPT = (
    "area",
    "prot",
    "grows",
    "huge",
    "uffd",
    "mergeable",
    "dontfork",
    "wipeonfork",
    "file",
    "shift",
    "locked",
)


def same_vma(a: State, b: State) -> bool:
    """Whether neighbours of these states may be one vma."""
    return all(getattr(a, name) == getattr(b, name) for name in _KEPT)


def _edges(space: Space, i: int, step: int, limit: int) -> list[int]:
    # Page numbers at which the vma of segs[i] may begin (step -1) or end (1); the last one is certain, or limit.
    segs, states = space.segs, space.lives.states
    out: list[int] = []
    while True:
        at = segs[i].start if step < 0 else segs[i].end
        page = at >> PAGE_SHIFT
        if (page <= limit) if step < 0 else (page >= limit):
            return [*out, limit]
        j = i + step
        joined = 0 <= j < len(segs) and at == (segs[j].end if step < 0 else segs[j].start)
        if not joined or not same_vma(states[segs[i].state], states[segs[j].state]):
            return [*out, page]
        if states[segs[i].state].made != states[segs[j].state].made:
            out.append(page)
        i = j


def around(space: Space, i: int, page: int) -> list[tuple[int, int, bool]]:
    """(first key, key behind the last, surely) of what a read of page number `page` in segs[i] maps, by the vmas."""
    base = page & -WINDOW
    end = (page & -_TABLE) + _TABLE
    spans = [
        (max(base, start), min(max(base, start) + WINDOW, end, stop))
        for start in _edges(space, i, -1, base)
        for stop in _edges(space, i, 1, base + 2 * WINDOW)
    ]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    sure_low, sure_high = max(s[0] for s in spans), min(s[1] for s in spans)
    out = []
    for first, last, sure in (
        (low, sure_low, False),
        (sure_low, sure_high, True),
        (sure_high, high, False),
    ):
        j = space.index(first << PAGE_SHIFT) if first < last else -1
        while 0 <= j < len(space.segs) and (seg := space.segs[j]).start < last << PAGE_SHIFT:
            a, b = max(seg.start >> PAGE_SHIFT, first), min(seg.end >> PAGE_SHIFT, last)
            key = seg.key - (seg.start >> PAGE_SHIFT)
            out.append((key + a, key + b, sure))
            j += 1
    return out
