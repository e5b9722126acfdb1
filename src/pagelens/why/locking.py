"""What locks and populates memory, and what ends it, in the words of `space.State`."""

from __future__ import annotations

from pagelens.why.evidence import Area
from pagelens.why.lives import LOCKED, ONFAULT, Seg, State
from pagelens.why.space import Space
from pagelens.why.windows import same_vma


def populate(state: State, time: int, write: bool) -> State:
    """A state whose pages a call has made present at `time` (ns); write: with write faults."""
    own = write and state.area in (Area.ANON, Area.FILE)
    return state._replace(
        populated=time,
        populated_read=state.populated_read if write else time,
        populated_own=time if own else state.populated_own,
    )


def lock(state: State, time: int, on_fault: bool = False, fill: bool = True) -> State:
    """A state that mlock has been asked for. fill: and its pages made present, as far as rights allow.

    mlock_fixup passes over what cannot be locked; populate_vma_page_range: a write fault for private writable memory,
    else a read; nothing without rights, nor where pages are locked as they come.
    """
    if state.area is Area.SPECIAL:
        return state
    if state.area is not Area.HUGETLB:
        state = state._replace(locked=ONFAULT if on_fault else LOCKED)
    if not state.prot or on_fault or not fill:
        return state
    return populate(state, time, bool(state.prot & 2) and state.area in (Area.ANON, Area.FILE))


def unlock_vma(space: Space, moved: Seg, state: State) -> None:
    """After MREMAP_DONTUNMAP of `moved` (state: its own, emptied): all of its vma is not locked any more.

    dontunmap_complete (mm/mremap.c) clears VM_LOCKED of the vma, not only of the part that was moved.
    """

    def one(i: int, edge: int, at: int) -> bool:
        if not 0 <= i < len(space.segs) or at != edge:
            return False
        other = space.lives.states[space.segs[i].state]
        return bool(other.locked) and same_vma(other._replace(locked=0), state)

    i = space.index(moved.start)
    low, high = moved.start, moved.end
    j = i - 1
    while one(j, low, space.segs[j].end):
        low, j = space.segs[j].start, j - 1
    j = i + 1
    while one(j, high, space.segs[j].start if j < len(space.segs) else -1):
        high, j = space.segs[j].end, j + 1
    space.change(low, high, lambda s: s._replace(locked=0))
