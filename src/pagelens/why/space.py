"""One address space over time: intervals of equal state, each with the key of its first page (`lives`)."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import HPAGE_SIZE, PAGE_SHIFT, PAGE_SIZE
from pagelens.why.evidence import Area, Mark, Origin
from pagelens.why.lives import DROP_LINK, FORK_LINK, LOCKED, NO_LINK, Lives, Seg, State
from pagelens.why.windows import AROUND, WINDOW, around, same_vma

I64 = npt.NDArray[np.int64]


def _paged(state: State) -> int:
    # Since when a page must have been left alone (ns) for MADV_PAGEOUT to have taken it; -1 where it was not asked for.
    # Of anonymous memory it takes what MADV_FREE had given away; the rest goes to swap, where what drops it finds it.
    if state.area is Area.ANON:
        return state.freed_out
    return state.mark_time if state.mark is Mark.PAGEOUT else -1


def _advised(state: State, mark: Mark, time: int) -> State:
    state = state._replace(mark=mark, mark_time=time)
    if mark is Mark.FREE:
        return state._replace(free_time=time)
    return state._replace(freed_out=state.free_time) if mark is Mark.PAGEOUT else state


def _keys(seg: Seg) -> tuple[int, int]:
    return seg.key, seg.key + ((seg.end - seg.start) >> PAGE_SHIFT)


def _pages(seg: Seg, state: State) -> tuple[tuple[str, int], int, int]:
    # File, number of its first page and of the page behind the last.
    assert state.file
    return state.file, (seg.start + state.shift) >> PAGE_SHIFT, (seg.end + state.shift) >> PAGE_SHIFT


class Space:
    """The intervals of one address space, now. Every change is O(intervals touched) plus a list insertion."""

    def __init__(self, mm: int, lives: Lives, seen: bool) -> None:
        self.mm = mm
        self.lives = lives
        self.seen = seen  # a first snapshot (or a parent) tells what is mapped
        self.starts: list[int] = []
        self.segs: list[Seg] = []
        self.past: list[tuple[int, int, int, Seg]] = []  # removed: (from ns, till ns, seq, what)
        self.drops: list[tuple[int, int, int]] = []  # (first key, key behind the last, ns): shared no more
        # Of files and shared memory: populated by a call; given advice; holes in a private mapping's file.
        self.filled: list[tuple[int, int, int]] = []
        self.advised: list[tuple[int, int, int, Mark]] = []
        self.holes: list[tuple[int, int, int]] = []
        self.owned: list[tuple[int, int, int]] = []  # private memory: populated with write faults
        self.around: list[
            tuple[int, int, int, bool]
        ] = []  # mapped around reads, see `windows`; surely or perhaps
        self.mergeable = False  # PR_SET_MEMORY_MERGE
        self.faulted = 0  # faults that the kernel took for the call that is applied
        self.future: int = 0  # mlockall(MCL_FUTURE): LOCKED or ONFAULT
        self._columns: tuple[I64, I64, I64, I64] | None = None

    def index(self, addr: int) -> int:
        """Index of the interval that holds addr, or -1."""
        i = bisect.bisect_right(self.starts, addr) - 1
        return i if i >= 0 and addr < self.segs[i].end else -1

    def maps(self, file: tuple[str, int]) -> bool:
        """Whether any interval is of that file."""
        return any(self.lives.states[seg.state].file == file for seg in self.segs)

    def cut(self, addr: int) -> None:
        """Make addr a boundary."""
        i = self.index(addr)
        if i < 0 or self.segs[i].start == addr:
            return
        seg = self.segs[i]
        right = Seg(addr, seg.end, seg.key + ((addr - seg.start) >> PAGE_SHIFT), seg.state)
        seg.end = addr
        self.segs.insert(i + 1, right)
        self.starts.insert(i + 1, addr)
        self._columns = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Index range of the intervals inside [start, end), after cutting at both ends."""
        self.cut(start)
        self.cut(end)
        return bisect.bisect_left(self.starts, start), bisect.bisect_left(self.starts, end)

    def remove(
        self, start: int, end: int, seq: int, since: int, until: int, moved: bool = False
    ) -> list[Seg]:
        """Unmap; returns what was there, and remembers it. moved: it will be inserted elsewhere."""
        lo, hi = self.span(start, end)
        gone = self.segs[lo:hi]
        if gone:
            del self.segs[lo:hi]
            del self.starts[lo:hi]
            self.past += [(since, until, seq, seg) for seg in gone]
            if not moved:
                self.drops += [(*_keys(seg), since) for seg in gone]
            self._columns = None
        return gone

    def insert(self, seg: Seg) -> None:
        """Map; the range must be free."""
        i = bisect.bisect_left(self.starts, seg.start)
        self.segs.insert(i, seg)
        self.starts.insert(i, seg.start)
        self._columns = None

    def map(
        self, start: int, end: int, state: State, origin: Origin, time: int, seq: int, fresh: bool = True
    ) -> None:
        """A mapping over whatever was there. fresh: with what mlockall and prctl ask of new ones (mm->def_flags); else
        the state is all, as when mremap copies a vma."""
        if end <= start:
            return
        self.remove(start, end, seq, time, time)
        if fresh and self.future and state.area is not Area.HUGETLB:
            state = state._replace(locked=self.future)
        if fresh and self.future == LOCKED and state.prot and state.populated < 0:
            private = state.area in (Area.ANON, Area.FILE)
            owned = time if state.prot & 2 and private else -1
            state = state._replace(
                populated=time, populated_read=-1 if owned >= 0 else time, populated_own=owned
            )
        if fresh and self.mergeable:
            state = state._replace(mergeable=True)
        key = self.lives.begin((end - start) >> PAGE_SHIFT, self.mm, origin, time, seq)
        seg = Seg(start, end, key, self.lives.intern(state))
        self.insert(seg)
        if state.populated >= 0:
            self._populated(seg, state)
            self._around(seg, state)

    def change(self, start: int, end: int, how: Callable[[State], State]) -> None:
        """Change the state of all that is mapped in [start, end)."""
        lo, hi = self.span(start, end)
        read = []
        for seg in self.segs[lo:hi]:
            old = self.lives.states[seg.state]
            new = how(old)
            # Copies of what a fork had shared: nobody else's any more.
            if new.populated_own != old.populated_own:
                self.drops.append((*_keys(seg), new.populated_own))
            if new.populated != old.populated:
                self._populated(seg, new)
            if new.populated_read != old.populated_read:
                read.append(seg)
            seg.state = self.lives.intern(new)
        self._columns = None
        for seg in read:
            self._around(seg, self.lives.states[seg.state])

    def _populated(self, seg: Seg, state: State) -> None:
        if state.area is not Area.ANON:
            self.filled.append((*_keys(seg), state.populated))
        if state.file:
            self.lives.cached.append((*_pages(seg, state), state.populated, True))
        if state.populated_own == state.populated:
            self.owned.append((*_keys(seg), state.populated))

    def _around(self, seg: Seg, state: State) -> None:
        # What a call populated with reads has neighbours: mapped as well if a page of that window was not there yet.
        if state.populated_read < 0 or state.area not in AROUND:
            return
        i = self.index(seg.start)
        first, last = seg.start >> PAGE_SHIFT, (seg.end >> PAGE_SHIFT) - 1
        faulted = self.faulted > 0 and first // WINDOW == last // WINDOW
        for page in (first, last):
            self.around += [(a, b, state.populated_read, s and faulted) for a, b, s in around(self, i, page)]

    def read(self, i: int, page: int, time: int) -> None:
        """A read fault on page number `page`, in segs[i]."""
        self.around += [(a, b, time, sure) for a, b, sure in around(self, i, page)]

    def own(self, start: int, end: int, time: int) -> None:
        """Pages that became the process's own by other means than a write: UFFDIO_COPY."""
        lo, hi = self.span(start, end)
        self.owned += [(*_keys(seg), time) for seg in self.segs[lo:hi]]

    def unshare(self, start: int, end: int, time: int) -> None:
        """Private pages that are nobody else's any more."""
        lo, hi = self.span(start, end)
        private = (Area.ANON, Area.FILE)
        self.drops += [
            (*_keys(seg), time) for seg in self.segs[lo:hi] if self.lives.states[seg.state].area in private
        ]

    def advise(self, start: int, end: int, mark: Mark, time: int) -> None:
        """MADV_FREE, MADV_COLD, MADV_PAGEOUT."""
        self.change(start, end, lambda s: _advised(s, mark, time))
        lo, hi = self.span(start, end)
        for seg in self.segs[lo:hi]:
            state = self.lives.states[seg.state]
            if state.area in AROUND and mark is not Mark.FREE:
                self.advised.append((*_keys(seg), time, mark))
                if state.file and mark is Mark.PAGEOUT:
                    self.lives.cached.append((*_pages(seg, state), time, False))

    def hole(self, start: int, end: int, time: int) -> None:
        """A hole in the file of a private mapping: the file's pages go, copies stay."""
        self.change(start, end, lambda s: s._replace(hole_time=time))
        lo, hi = self.span(start, end)
        self.holes += [(*_keys(seg), time) for seg in self.segs[lo:hi]]

    def drop(self, start: int, end: int, time: int, seq: int, origin: Origin = Origin.DONTNEED) -> None:
        """The pages go, the mapping stays: MADV_DONTNEED and its like."""
        lo, hi = self.span(start, end)
        for seg in self.segs[lo:hi]:
            self.drops.append((*_keys(seg), time))
            state = self.lives.states[seg.state]
            pages = (seg.end - seg.start) >> PAGE_SHIFT
            seg.key = self.lives.begin(
                pages,
                self.mm,
                origin,
                time,
                seq,
                DROP_LINK,
                seg.key,
                state.populated,
                _paged(state),
            )
            state = state._replace(
                populated=-1, populated_read=-1, populated_own=-1, mark=Mark.NONE, mark_time=-1
            )
            seg.state = self.lives.intern(state._replace(free_time=-1, freed_out=-1, wp_time=-1))
        self._columns = None

    def fork(self, mm: int, time: int, seq: int) -> Space:
        """The child's address space (dup_mmap, kernel/fork.c)."""
        child = Space(mm, self.lives, self.seen)
        child.mergeable = self.mergeable
        for i, seg in enumerate(self.segs):
            state = self.lives.states[seg.state]
            if state.dontfork:
                continue
            link, parent = (NO_LINK, -1) if state.wipeonfork else (FORK_LINK, seg.key)
            # dup_userfaultfd: without EVENT_FORK the child is not registered
            state = state._replace(uffd=0, wp_time=-1, locked=0)
            if state.wipeonfork or state.area not in (Area.ANON, Area.FILE):  # shared memory is mapped anew
                state = state._replace(populated=-1, populated_read=-1, populated_own=-1, mark=Mark.NONE)
            pages = (seg.end - seg.start) >> PAGE_SHIFT
            key = self.lives.begin(pages, mm, Origin.FORK, time, seq, link, parent)
            child.segs.append(Seg(seg.start, seg.end, key, self.lives.intern(state)))
            if state.area in (Area.ANON, Area.FILE) and self._joined(i):
                self.lives.joined.add(len(self.lives.key) - 1)
        child.starts = [seg.start for seg in child.segs]
        return child

    def _joined(self, i: int) -> bool:
        # Whether a neighbour by another call continues segs[i].
        segs, states = self.segs, self.lives.states
        for a, b in ((i - 1, i), (i, i + 1)):
            if a >= 0 and b < len(segs) and segs[a].end == segs[b].start:
                left, right = states[segs[a].state], states[segs[b].state]
                if left.made != right.made and same_vma(left, right):
                    return True
        return False

    def grow(self, addr: int, time: int, seq: int) -> Seg | None:
        """Extend the stack above addr down to it, as expand_stack does; None where there is none."""
        i = bisect.bisect_right(self.starts, addr)
        if i >= len(self.segs):
            return None
        above = self.segs[i]
        state = self.lives.states[above.state]
        if not state.grows:
            return None
        start = addr & ~(PAGE_SIZE - 1)
        key = self.lives.begin((above.start - start) >> PAGE_SHIFT, self.mm, Origin.GROWTH, time, seq)
        state = state._replace(
            populated=-1, populated_read=-1, populated_own=-1
        )  # growth brings the page of the fault alone
        seg = Seg(start, above.start, key, self.lives.intern(state))
        self.insert(seg)
        return seg

    def columns(self) -> tuple[I64, I64, I64, I64]:
        """(start, end, key, state) of all intervals, int64."""
        if self._columns is None:
            rows = [(s.start, s.end, s.key, s.state) for s in self.segs]
            table = np.array(rows, np.int64).reshape(-1, 4)
            self._columns = (table[:, 0], table[:, 1], table[:, 2], table[:, 3])
        return self._columns

    def block_fits(self, addr: int) -> bool:
        """Whether the 2 MiB block around addr lies within memory of one kind (so that it can be huge)."""
        start = addr & ~(HPAGE_SIZE - 1)
        end = start + HPAGE_SIZE
        i = self.index(start)
        if i < 0:
            return False
        first = self.lives.states[self.segs[i].state]
        while i < len(self.segs) and self.segs[i].start < end:
            state = self.lives.states[self.segs[i].state]
            if (state.area, state.prot, state.huge) != (first.area, first.prot, first.huge):
                return False
            if self.segs[i].end >= end:
                return True
            if i + 1 >= len(self.segs) or self.segs[i + 1].start != self.segs[i].end:
                return False
            i += 1
        return False
