"""What intervals of address spaces hold, and the lives of their pages.

A page's identity here is neither its address (mremap moves it, munmap and mmap reuse the address) nor its
frame (nobody records it for each fault), but the life of its range: mmap, brk, DONTNEED, fork give the range
new keys, mremap carries them along. "The fault before this one on the same page" is then a sort by key.
Rejected: a dict of page states changed fault by fault (a Python step for each of a million faults).
"""

from __future__ import annotations

from typing import NamedTuple

from pagelens.why.evidence import Area, Mark, Origin

NO_LINK, FORK_LINK, DROP_LINK = 0, 1, 2
# State.uffd: registration modes; ASYNC: write protection without a handler; BEFORE: registered before we looked.
UFFD_MISSING, UFFD_WP, UFFD_MINOR, UFFD_ASYNC, UFFD_BEFORE = 1, 2, 4, 8, 16
# State.locked and Space.future: locked and populated; locked page by page as faults bring them.
LOCKED, ONFAULT = 1, 2
# Keys of pages in ranges that nothing is known of: by mm and page number, far above the counted ones.
UNSEEN_KEY = 1 << 60


class State(NamedTuple):
    """What holds for every page of an interval. Times are ns, -1 = never."""

    area: Area
    prot: int
    grows: bool = False
    huge: bool = False  # transparent huge pages may be made here
    uffd: int = 0  # UFFD_* bits: how the range is registered with userfaultfd
    guard: bool = False
    populated: int = -1
    populated_read: int = -1  # with read faults, which map what lies around in a file or in shared memory
    populated_own: int = -1  # populated with write faults: every page one's own since then
    mark: Mark = Mark.NONE
    mark_time: int = -1
    free_time: int = -1  # MADV_FREE, whatever advice came later
    freed_out: int = -1  # free_time when MADV_PAGEOUT came: it took what had been left alone since
    prot_time: int = -1
    sync_time: int = -1
    wp_time: int = -1  # write-protected: by UFFDIO_WRITEPROTECT or PAGEMAP_SCAN
    hole_time: int = -1  # private mapping of a file: a hole took file pages away, copies stay
    clear_time: int = -1  # write-protected: by a 4 in clear_refs
    mergeable: bool = False  # KSM may merge its pages
    dontfork: bool = False
    wipeonfork: bool = False
    locked: int = 0  # LOCKED or ONFAULT
    made: int = -1  # seq of the call that mapped it, -1 = it was there at the first snapshot
    name: str = ""
    file: tuple[str, int] | None = None  # (dev as in maps, inode)
    shift: int = 0  # offset in the file less the address


class Seg:
    """[start, end) with one state; `key` names its first page."""

    __slots__ = ("end", "key", "start", "state")

    def __init__(self, start: int, end: int, key: int, state: int) -> None:
        self.start, self.end, self.key, self.state = start, end, key, state


class Lives:
    """All states (interned) and all lives of ranges, of all address spaces. Keys ascend in order of birth."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self._known: dict[State, int] = {}
        self.key: list[int] = []
        self.mm: list[int] = []
        self.origin: list[int] = []
        self.time: list[int] = []
        self.seq: list[int] = []
        self.link: list[int] = []
        self.parent: list[int] = []  # key of the first page in the life before, -1 without
        self.populated: list[int] = []  # when a call had populated the life before: ns, -1 never
        self.paged: list[int] = []  # MADV_PAGEOUT may have taken what was not touched since then: ns, -1 none
        # Pages of files that calls brought into the page cache (True), or perhaps took out: file, pages, ns.
        self.cached: list[tuple[tuple[str, int], int, int, int, bool]] = []
        self.joined: set[int] = (
            set()
        )  # begun by fork, of mappings that may have been one vma with a neighbour
        self._next = 0

    @property
    def end(self) -> int:
        """The key behind the last."""
        return self._next

    def intern(self, state: State) -> int:
        """The number of a state."""
        number = self._known.get(state)
        if number is None:
            number = self._known[state] = len(self.states)
            self.states.append(state)
        return number

    def begin(
        self,
        pages: int,
        mm: int,
        origin: Origin,
        time: int,
        seq: int,
        link: int = NO_LINK,
        parent: int = -1,
        populated: int = -1,
        paged: int = -1,
    ) -> int:
        """A new life for `pages` pages; returns the key of the first."""
        key = self._next
        self._next += pages
        self.key.append(key)
        self.mm.append(mm)
        self.origin.append(origin)
        self.time.append(time)
        self.seq.append(seq)
        self.link.append(link)
        self.parent.append(parent)
        self.populated.append(populated)
        self.paged.append(paged)
        return key
