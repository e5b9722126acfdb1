"""MiniMm: an address space as a student sees it: a list of vmas, a page table, frames, and no more.

It is not the model: it holds state and knows no rule. Before each operation the grader fills one from the
reference, the student's function changes it, and what comes out is compared with what the reference (and this
kernel) did. So an exercise can be solved alone, and one mistake does not spoil what follows.

Names, flag bits and error codes are the kernel's own. Addresses are bytes; a page number is `addr // PAGE`.
Rejected: handing out the model's own Process (a solution would be one call of the reference); a page table of
four levels to fill in (the walk is shown by `pagelens model step`; here the entry is what matters).
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Final, SupportsIndex

PAGE: Final = 4096
# The end of user space. Where the kernel that decides has five levels of page tables, the student's process has theirs.
TASK_SIZE = 0x7FFF_FFFF_F000
ZERO_FRAME: Final = 1  # the zero page: shared by all, never writable, its map count stays 0

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x4000, 0x10_0000
PF_PROT, PF_WRITE, PF_USER, PF_INSTR = 1, 2, 4, 16  # bits of x86's page-fault error code

# What a fault handler answers.
MINOR: Final = "minor"
SEGV_MAPERR: Final = "SEGV_MAPERR"
SEGV_ACCERR: Final = "SEGV_ACCERR"
BUS_ADRERR: Final = "BUS_ADRERR"


class VM(enum.IntFlag):
    """Bits of a vma's flags: those of the kernel's vm_flags that the exercises need, with its values."""

    READ = 0x1
    WRITE = 0x2
    EXEC = 0x4
    SHARED = 0x8
    LOCKED = 0x2000
    DONTCOPY = 0x2_0000  # MADV_DONTFORK
    ACCOUNT = 0x10_0000  # charged against the commit limit: private, writable, not MAP_NORESERVE
    NORESERVE = 0x20_0000
    WIPEONFORK = 0x200_0000


def page_align(length: int) -> int:
    """`length` rounded up to whole pages, in bytes (PAGE_ALIGN)."""
    return (length + PAGE - 1) // PAGE * PAGE


@dataclass(slots=True)
class Vma:
    """One vm_area_struct: [start, end), whole pages.

    flags: VM bits. file: "" for private anonymous memory, else the name of its file ("shmem#N" for shared
    anonymous memory: each such mapping has an object of its own). pgoff: page of the file at `start`; 0 for
    anonymous memory. anon_vma: 0 until the first private page of its own is about to exist (anon_prepare);
    equal numbers mean one anon_vma. fork_child: a fork copied it from a parent's vma that had an anon_vma.
    """

    start: int
    end: int
    flags: VM
    file: str = ""
    pgoff: int = 0
    anon_vma: int = 0
    fork_child: bool = False

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return (self.end - self.start) // PAGE

    def copy(self, **changes: Any) -> Vma:
        """Another vma that is like this one but for the fields given."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Pte:
    """A present page-table entry. exclusive: the anonymous frame is known to belong to this process alone
    (PageAnonExclusive), so that a write may reuse it."""

    frame: int
    writable: bool = False
    exclusive: bool = False


class Vmas(list[Vma]):
    """The vmas by address. A list that counts in `looked` how many of its items were looked at."""

    looked = 0

    def __getitem__(self, index: Any) -> Any:
        """As of a list; counts."""
        self.looked += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Vma]:
        """As of a list; counts as it goes."""
        i = 0
        while i < len(self):
            self.looked += 1
            yield super().__getitem__(i)
            i += 1

    def index(self, value: Vma, start: SupportsIndex = 0, stop: SupportsIndex = 1 << 62) -> int:
        """As of a list; counts all."""
        self.looked += len(self)
        return super().index(value, start, stop)


class Frames:
    """Frames of the machine: who is anonymous, how often each is mapped, which hold a page of a file."""

    def __init__(self) -> None:
        self.mapcount: dict[int, int] = {}
        self.anon: set[int] = set()
        self.cache: dict[str, dict[int, int]] = {}  # file -> page of it -> frame
        self.sizes: dict[str, int] = {}  # file -> its pages
        self.next = 1 << 40  # numbers that the reference does not use

    def new(self) -> int:
        """A number of a new frame."""
        self.next += 1
        return self.next


class PageTable(MutableMapping[int, Pte]):
    """Page number -> Pte of the pages that are present. Setting and deleting keep the frames' map counts."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._entries: dict[int, Pte] = {}

    def load(self, entries: dict[int, Pte]) -> None:
        """Take entries over whose map counts stand already (for the grader)."""
        self._entries = dict(entries)

    def _count(self, pte: Pte, by: int) -> None:
        if pte.frame != ZERO_FRAME:
            self._frames.mapcount[pte.frame] = self._frames.mapcount.get(pte.frame, 0) + by

    def __getitem__(self, page: int) -> Pte:
        """The entry. KeyError: not present."""
        return self._entries[page]

    def __setitem__(self, page: int, pte: Pte) -> None:
        """Set an entry: what it replaced is mapped once less, its frame once more."""
        if not isinstance(pte, Pte):
            raise TypeError(f"mm.ptes[page] takes a Pte, not {type(pte).__name__}")
        old = self._entries.get(page)
        self._count(pte, 1)
        if old is not None:
            self._count(old, -1)
        self._entries[page] = pte

    def __delitem__(self, page: int) -> None:
        """Clear an entry. KeyError: not present."""
        self._count(self._entries.pop(page), -1)

    def __iter__(self) -> Iterator[int]:
        """The page numbers; a copy, so that entries may be deleted meanwhile."""
        return iter(list(self._entries))

    def __len__(self) -> int:
        """Pages present."""
        return len(self._entries)


class MiniMm:
    """An address space (mm_struct).

    vmas: sorted by address. ptes: page number -> Pte, present pages only. brk, start_brk: the heap's end and
    start, exact bytes. mmap_base: placement goes down from here. max_map_count: how many vmas are allowed.
    rules: names of the kernel's rules that hold (docs/reference/model-rules.md), where kernels differ.
    """

    def __init__(self, frames: Frames | None = None) -> None:
        self.frames = frames or Frames()
        self.vmas: Vmas = Vmas()
        self.ptes = PageTable(self.frames)
        self.brk = self.start_brk = 0
        self.mmap_base = TASK_SIZE
        self.max_map_count = 65530
        self.rules: frozenset[str] = frozenset()
        self.flushes: list[tuple[int, int]] = []
        self.withheld: frozenset[str] = frozenset()

    def _given(self, name: str) -> None:
        if name in self.withheld:
            raise NotImplementedError(f"mm.{name} is what this exercise asks for")

    # -- vmas

    def find_vma(self, addr: int) -> Vma | None:
        """The first vma whose end is above `addr` (it need not hold `addr`), or None."""
        self._given("find_vma")
        at = bisect_right(self.vmas, addr, key=lambda v: v.end)
        return self.vmas[at] if at < len(self.vmas) else None

    def vma_at(self, addr: int) -> Vma | None:
        """The vma that holds `addr`, or None (vma_lookup)."""
        vma = self.find_vma(addr)
        return vma if vma is not None and vma.start <= addr else None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The vmas that share a byte with [start, end)."""
        return [v for v in self.vmas if v.start < end and v.end > start]

    def insert(self, vma: Vma) -> None:
        """Add a vma at its place in `vmas`."""
        self.vmas.insert(bisect_right(self.vmas, vma.start, key=lambda v: v.start), vma)

    def split(self, vma: Vma, addr: int) -> Vma:
        """Cut a vma in two at `addr`: `vma` keeps what is below; what is above is inserted and returned."""
        if not vma.start < addr < vma.end or addr % PAGE:
            raise ValueError(f"{addr:#x} is no page boundary inside {vma.start:#x}-{vma.end:#x}")
        pgoff = vma.pgoff + (addr - vma.start) // PAGE if vma.file else 0
        upper = vma.copy(start=addr, pgoff=pgoff)
        vma.end = addr
        self.insert(upper)
        return upper

    def anon_prepare(self, vma: Vma) -> None:
        """Give the vma its anon_vma, if it has none: due before the first private page of its own
        (anon_vma_prepare)."""
        if not vma.anon_vma:
            vma.anon_vma = self.frames.new()

    def unmap(self, start: int, end: int) -> int:
        """What munmap does once its arguments are checked: 0, or -ENOMEM where a split passes the limit."""
        self._given("unmap")
        for vma in self.overlapping(start, end):
            if vma.start < start and vma.end > end and len(self.vmas) >= self.max_map_count:
                return -12
        for vma in self.overlapping(start, end):
            middle = self.split(vma, start) if vma.start < start else vma
            if middle.end > end:
                self.split(middle, end)
            self.vmas.remove(middle)
        for page in self.ptes:
            if start <= page * PAGE < end:
                del self.ptes[page]
        self.flush_tlb(start, end)
        return 0

    # -- frames and the TLB

    def new_frame(self) -> int:
        """A new anonymous frame; `mm.ptes[page] = Pte(frame, …)` maps it."""
        frame = self.frames.new()
        self.frames.anon.add(frame)
        return frame

    def is_anon(self, frame: int) -> bool:
        """Whether the frame is anonymous memory: not the zero page, not a page of a file."""
        return frame in self.frames.anon

    def mapcount(self, frame: int) -> int:
        """How many entries of all processes map the frame; of the zero page 0."""
        return self.frames.mapcount.get(frame, 0)

    def file_pages(self, file: str) -> int:
        """The size of a file in pages."""
        return self.frames.sizes.get(file, 0)

    def cached(self, file: str, page: int) -> int | None:
        """The frame that holds this page of the file in the page cache, or None."""
        return self.frames.cache.get(file, {}).get(page)

    def read_page(self, file: str, page: int) -> int:
        """The same, brought into the page cache if it is not there."""
        pages = self.frames.cache.setdefault(file, {})
        if page not in pages:
            pages[page] = self.frames.new()
        return pages[page]

    def flush_tlb(self, start: int, end: int) -> None:
        """Flush what processors may remember of [start, end). Owed wherever an entry lost its frame, got
        another one, or lost a permission. Not owed where an entry only gained: a stale one costs a spurious fault."""
        self.flushes.append((start, end))
