"""The exercises in words: what each asks for, the file to start with, and the programs that always run.

The fixed programs are scenarios (docs/scenarios.md), one for each thing that is easily got wrong; random ones
follow them. Which operations are graded is said in `exercises`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """function, parameters, returns: of what the student writes. title: a line. task: the docstring. fixed:
    (title, scenario). page: of docs/lab."""

    function: str
    parameters: str
    returns: str
    title: str
    task: str
    fixed: tuple[tuple[str, str], ...]
    page: str

    def template(self) -> str:
        """The file to start with."""
        task = self.task.strip().replace("\n", "\n    ").replace("\n    \n", "\n\n")
        return (
            f'"""{self.title}. docs/lab/{self.page}; grade it with\n\n'
            f"    pagelens model grade {self.name} FILE\n"
            '"""\n\n'
            "from __future__ import annotations\n\n"
            "import errno  # results are 0 or more, or -errno.EINVAL and so on, as in the kernel\n\n"
            "from pagelens.lab import *  # MiniMm, Vma, Pte, VM, PAGE, page_align, ...\n\n\n"
            f"def {self.function}({self.parameters}) -> {self.returns}:\n"
            f'    """{task}\n    """\n'
            f'    raise NotImplementedError("{self.function} is still to be written")\n'
        )

    @property
    def name(self) -> str:
        """As on the command line."""
        return next(name for name, text in TEXTS.items() if text is self)


_SIX = "a = mmap 6 at arena[4] rw private anon fixed\n"

TEXTS: dict[str, Text] = {
    "find-vma": Text(
        "find_vma", "mm: MiniMm, addr: int", "Vma | None", "Look up a vma, and do not look at them all",
        """\
The first vma of `mm.vmas` whose end is above `addr`, or None if there is none.

It need not hold `addr`: the caller looks at its start (the stack below may grow). `end` is the first byte
behind the vma. `mm.vmas` is sorted. Look at no more than about 4 log2(n) of n vmas: a process may have
65,530 of them, and every fault asks.""",
        (
            ("edges", "mmap 2 at arena[4] rw private anon fixed\nmmap 1 at arena[6] r private anon fixed\n"
             "read arena[3]\nread arena[4]\nread arena[5]\nread arena[6]\nread arena[7]\nread arena[0]\n"),
            ("many", "".join(f"mmap 1 at arena[{2 * i}] rw private anon fixed\n" for i in range(200))
             + "read arena[1]\nread arena[398]\nread arena[200]\nread arena[399]\n"),
        ),
        "find-vma.md",
    ),
    "fault": Text(
        "fault", "mm: MiniMm, addr: int, error_code: int", "str", "A page fault of private anonymous memory",
        """\
Handle a page fault of a user access, and say how it ended: MINOR, SEGV_MAPERR or SEGV_ACCERR.

error_code has the bits PF_PROT (the page is present), PF_WRITE, PF_INSTR (instruction fetch), PF_USER.
Look up the vma (none: SEGV_MAPERR), ask it whether it allows the access (no: SEGV_ACCERR), then
set `mm.ptes[addr // PAGE]`:
- a read of an absent page maps the zero page: Pte(ZERO_FRAME);
- a write of an absent page maps mm.new_frame(), writable and exclusive; mm.anon_prepare(vma) is due first;
- a write of a present, read-only page: the frame is reused if it is anonymous and exclusive, or if nobody
  else maps it (mm.mapcount), and is exclusive and writable from then on; else the page is copied to a new
  frame. The zero page is nobody's: it is always replaced.
Where an entry gets another frame, mm.flush_tlb(start, end) is owed.
If the page is not present, a vma that allows anything allows a read, and a fetch as well (the page then comes,
and the fetch faults again, with PF_PROT). A read or fetch with PF_PROT is always SEGV_ACCERR: the entry is
there and forbids it.""",
        (
            ("first touch", _SIX + "read a[0]\nwrite a[1]\nwrite a[0]\nwrite a[5]\nread a[4]\n"),
            ("outside", _SIX + "read arena[3]\nwrite arena[10]\nread arena[11]\n"),
            ("permission", _SIX + "mprotect a[0:2] r\nmprotect a[2:4] none\nwrite a[0]\nread a[2]\nwrite a[3]\n"
             "read a[1]\nwrite a[1]\nexec a[4]\nexec a[4]\n"),
            ("protected while present", _SIX + "write a[0:4]\nmprotect a[0:2] r\nmprotect a[2] none\n"
             "write a[0]\nread a[2]\nmprotect a[0:3] rw\nwrite a[0]\nwrite a[2]\nexec a[1]\n"),
            ("copy, then reuse", _SIX + "write a[0:3]\nq = fork\nwrite a[0]\nq: write a[0]\nq: write a[1]\n"
             "q: read a[2]\nwrite a[1]\nq: exit\nwrite a[2]\n"),
            ("write only", "mmap 2 at arena[0] w private anon fixed\nread arena[0]\nwrite arena[1]\n"),
        ),
        "fault.md",
    ),
    "file-fault": Text(
        "file_fault", "mm: MiniMm, vma: Vma, addr: int, write: bool", "str",
        "A page fault of a file mapping",
        """\
Handle a fault in a vma that maps a file or shared memory (vma.file is set), once the vma has allowed it;
return MINOR or BUS_ADRERR. The page may be absent, or present and read-only with `write` set.

index = vma.pgoff + (addr - vma.start) // PAGE is the page of the file. At or behind
mm.file_pages(vma.file): BUS_ADRERR.
- read: the frame of the page cache (mm.read_page) is mapped; writable only if the vma is VM.SHARED and
  VM.WRITE. Before that, fault-around: all pages that are cached (mm.cached) and have no entry yet are mapped,
  in the same way, in a window of 16 pages: it starts at the page number rounded down to a multiple of 16, or
  where the vma starts if that is later, and ends 16 pages on, but within the vma, the file, and the page
  table (512 pages) of the faulting page.
- write, shared: the frame of the page cache, writable.
- write, private: a new frame, writable and exclusive, with mm.anon_prepare(vma) first - even where the file
  then turns out to be too short.
- write of a present page of a private mapping: reuse or copy, as for anonymous memory; a page of the file is
  always copied.""",
        (
            ("read, then write", "f = memfd 16\npwrite f[0:8]\na = mmap 8 at arena[0] rw private fixed file f\n"
             "read a[0]\nwrite a[0]\nwrite a[7]\nread a[5]\n"),
            ("fault-around", "f = memfd 40\npwrite f[0:8]\npwrite f[8:16]\npwrite f[20:28]\n"
             "a = mmap 40 at arena[3] r private fixed file f\nread a[2]\nread a[9]\nread a[13]\nread a[24]\n"
             "read a[35]\n"),
            ("the end of the file", "f = memfd 4\na = mmap 8 at arena[0] rw private fixed file f\nread a[3]\n"
             "read a[4]\nwrite a[5]\nb = mmap 8 at arena[20] rw shared fixed file f[2]\nwrite b[1]\n"
             "write b[2]\n"),
            ("shared", "a = mmap 4 at arena[0] rw shared anon fixed\nread a[0]\nwrite a[0]\nwrite a[1]\n"
             "q = fork\nq: read a[1]\nq: write a[0]\n"),
            ("copied, then forked", "f = memfd 8\npwrite f[0:8]\n"
             "a = mmap 4 at arena[0] rw private fixed file f\n"
             "write a[0:2]\nq = fork\nq: write a[0]\nwrite a[0]\nq: exit\nwrite a[1]\n"),
        ),
        "file-fault.md",
    ),
    "brk": Text(
        "brk", "mm: MiniMm, addr: int", "int", "brk, in four steps",
        """\
Move the end of the heap to `addr`; return the new break, or the old one if that cannot be.

1. Below mm.start_brk: refused (so brk(0) asks where it is).
2. mm.brk is exact; the vma is whole pages. If page_align(addr) is page_align(mm.brk), only mm.brk moves.
3. Down: unmap what is above (mm.unmap).
4. Up: refused if a vma overlaps the new pages, or the one page behind them; else the heap's vma grows, or a
   new one is made: VM.READ, VM.WRITE and VM.ACCOUNT. It grows only if there is a vma that ends here, lies
   above mm.start_brk, has the same flags and no file and was not copied by a fork (fork_child).
   It merges to the left only.""",
        (
            ("four steps", "brk heap[-1]\nbrk heap[4]\nwrite heap[0:4]\nbrk heap[6]\nbrk heap[1]\n"
             "brk heap[0]\n"),
            ("odd sizes", "brk heap[1]+1\nbrk heap[1]+100\nwrite heap[1]\nbrk heap[2]\nbrk heap[1]+4095\n"
             "brk heap[1]\nbrk heap[0]+1\nbrk heap[0]\n"),
            ("something in the way", "mmap 2 at heap[8] rw private anon fixed\nbrk heap[4]\nbrk heap[7]\n"
             "brk heap[8]\nbrk heap[7]+1\nbrk heap[9]\nbrk heap[6]+1\n"),
            ("other flags", "brk heap[3]\nmprotect heap[2] r\nbrk heap[5]\nbrk heap[2]\n"),
            ("after a fork", "brk heap[3]\nwrite heap[0]\nq = fork\nq: brk heap[5]\nbrk heap[5]\n"),
        ),
        "brk.md",
    ),
    "merge": Text(
        "can_merge", "mm: MiniMm, neighbour: Vma, new: Vma", "bool", "May two vmas be one?",
        """\
mmap is about to map `new`, which touches `neighbour` and nothing else. Will they become one vma?

They do if nothing that a vma says would be lost: the flags are equal, the file is the same and, for a file,
its pages go on where the other's end (pgoff; the neighbour may lie before or behind). Shared anonymous
memory is a file of its own each time. Nothing is merged with a vma that a fork copied, once that had an
anon_vma (neighbour.fork_child): the tree of anon_vmas would grow with every generation.""",
        (
            ("before and behind", "mmap 2 at arena[4] rw private anon fixed\n"
             "mmap 1 at arena[6] rw private anon fixed\n"
             "mmap 1 at arena[3] rw private anon fixed\nmmap 1 at arena[7] r private anon fixed\n"),
            ("flags", "mmap 2 at arena[0] rw private anon fixed\n"
             "mmap 1 at arena[2] rw private anon fixed noreserve\n"
             "mmap 2 at arena[8] rw shared anon fixed\nmmap 1 at arena[10] rw shared anon fixed\n"
             "mmap 2 at arena[20] rw private anon fixed\nmmap 2 at arena[22] rwx private anon fixed\n"),
            ("files", "f = memfd 16\ng = memfd 16\nmmap 2 at arena[0] r private fixed file f\n"
             "mmap 2 at arena[2] r private fixed file f[2]\nmmap 2 at arena[4] r private fixed file f[5]\n"
             "mmap 2 at arena[12] r private fixed file f[8]\nmmap 2 at arena[10] r private fixed file f[6]\n"
             "mmap 2 at arena[8] r private fixed file f[5]\nmmap 2 at arena[30] r private fixed file f\n"
             "mmap 2 at arena[32] r private fixed file g[2]\nmmap 2 at arena[40] r private anon fixed\n"
             "mmap 2 at arena[42] r private fixed file g\n"),
            ("fork", "mmap 2 at arena[0] rw private anon fixed\nwrite arena[0]\n"
             "mmap 2 at arena[8] rw private anon fixed\n"
             "q = fork\nq: mmap 1 at arena[2] rw private anon fixed\nmmap 1 at arena[2] rw private anon fixed\n"
             "q: mmap 1 at arena[10] rw private anon fixed\n"),
        ),
        "split-merge.md",
    ),
    "mmap": Text(
        "mmap", "mm: MiniMm, addr: int, length: int, prot: int, flags: int", "int",
        "Map private anonymous memory",
        """\
mmap of private anonymous memory: the address, or -errno.

- length 0: EINVAL. The length is rounded up to pages. More vmas than mm.max_map_count: ENOMEM.
- Where: MAP_FIXED and MAP_FIXED_NOREPLACE: exactly there; not a multiple of PAGE: EINVAL. Else `addr`,
  rounded down, is a hint: taken if it is not 0 and the range is free. Else the highest free range below
  mm.mmap_base (top-down).
- MAP_FIXED_NOREPLACE on something mapped: EEXIST. MAP_FIXED takes away what was there (mm.unmap; its error
  is ENOMEM).
- Neither MAP_PRIVATE nor MAP_SHARED, or both: EINVAL (only MAP_PRIVATE comes besides). The place is checked
  before this, and nothing is unmapped for a call that fails.
- The new vma: prot's bits, VM.NORESERVE for MAP_NORESERVE, else VM.ACCOUNT if it is writable.
- It merges with the neighbour before it and the one behind it: the rule of the exercise `merge`. With both,
  unless they have different anon_vmas; then with the one before only. (Kernel 6.1, the rule
  "mmap_merges_right_first" in mm.rules: with both only if their anon_vmas are equal or the one behind has
  none; else with the one behind.) The merged vma has an anon_vma if any part had.""",
        (
            ("alone", "a = mmap 3 rw private anon\nb = mmap 2 r private anon\nwrite b[0]\n"
             "c = mmap 1 rw private anon\n"),
            ("a hole is filled", _SIX + "write a[0]\nmunmap a[2:4]\nmmap 2 at a[2] rw private anon fixed\n"
             "munmap a[1:3]\nmmap 2 at a[1] r private anon fixed\n"),
            ("over something", _SIX + "write a[0:6]\nmmap 2 at a[2] rw private anon fixed\n"
             "mmap 4 at arena[8] r private anon fixed\nmmap 2 at a[0] rw private anon fixed_noreplace\n"
             "mmap 2 at arena[20] rw private anon fixed_noreplace\n"),
            ("refused", _SIX + "mmap 0 rw private anon\nmmap 2 at a[0]+8 rw private anon fixed\n"
             "mmap 2 at a[0] rw anon fixed\nmmap ~4097 at arena[20] rw private anon fixed\n"
             "mmap 2 at a[1] rw shared_validate anon fixed_noreplace\n"),
            ("hints", _SIX + "mmap 2 at arena[1]+5 rw private anon\nmmap 2 at a[5] rw private anon\n"
             "mmap 2 at arena[2] rw private anon\n"),
            ("two anon_vmas", "mmap 2 at arena[0] rw private anon fixed\n"
             "mmap 2 at arena[4] rw private anon fixed\n"
             "write arena[0]\nwrite arena[4]\nmmap 2 at arena[2] rw private anon fixed\n"),
            ("a fork's child", _SIX + "write a[0]\nq = fork\nq: mmap 1 at arena[10] rw private anon fixed\n"
             "q: mmap 1 at arena[3] rw private anon fixed\nmmap 1 at arena[10] rw private anon fixed\n"),
            ("flags", "mmap 2 at arena[0] rw private anon fixed\n"
             "mmap 2 at arena[2] rw private anon fixed noreserve\n"
             "mmap 2 at arena[4] r private anon fixed\nmmap 2 at arena[6] r private anon fixed\n"),
            ("the vma limit", "mmap 1 at arena[0] rw private anon fixed\n"
             "mmap 1 at arena[2] rw private anon fixed\n"
             "mmap 1 at arena[4] rw private anon fixed\nmmap 1 at arena[6] rw private anon fixed\n"
             "mmap 1 at arena[8] rw private anon fixed\n"),
        ),
        "vma-limit.md",
    ),
    "munmap": Text(
        "munmap", "mm: MiniMm, start: int, length: int", "int", "Unmap a range",
        """\
munmap: 0 or -errno.

`start` must be a multiple of PAGE, the range must end at or below TASK_SIZE, and its length, rounded up to
pages, must not be 0: else EINVAL. Nothing mapped there is no error.
A vma that reaches beyond an edge is split there (mm.split); one that reaches beyond both becomes two, so there
is one vma more: if mm.max_map_count is reached already, ENOMEM, and nothing changes.
The pages' entries go (del mm.ptes[page]), and a TLB flush is owed for them.""",
        (
            ("middle, head, tail, whole", _SIX + "write a[0:6]\nmunmap a[2:4]\nmunmap a[0]\nmunmap a[5]\n"
             "munmap arena[0:20]\n"),
            ("several at once", "mmap 2 at arena[0] rw private anon fixed\n"
             "mmap 2 at arena[2] r private anon fixed\n"
             "mmap 4 at arena[6] rw private anon fixed\nwrite arena[1]\nread arena[2]\nwrite arena[7]\n"
             "munmap arena[1:8]\n"),
            ("refused", _SIX + "munmap a[0]+1~4096\nmunmap a[0]~0\nmunmap 0x7ffffffff000[0:1]\n"
             "munmap arena[20:22]\nmunmap a[1]~1\n"),
            ("shared frames", _SIX + "write a[0:3]\nq = fork\nq: munmap a[1:5]\nwrite a[1]\nmunmap a[0:6]\n"),
            ("the vma limit", _SIX + "mmap 1 at arena[20] rw private anon fixed\n"
             "mmap 1 at arena[30] rw private anon fixed\n"
             "munmap a[2:4]\nmunmap a[0]\nmunmap arena[5:9]\nmunmap arena[20]\nmunmap arena[6:8]\n"),
        ),
        "split-merge.md",
    ),
    "mprotect": Text(
        "mprotect", "mm: MiniMm, start: int, length: int, prot: int", "int",
        "Change the protection of a range",
        """\
mprotect: 0 or -errno. The hardest one: it splits and merges.

`start` not a multiple of PAGE: EINVAL. Length 0: 0. A hole: ENOMEM - but what lies before it is changed.
Each vma in turn, for its part [start, end) of the range:
- new flags: VM.READ, WRITE, EXEC from prot. One that becomes writable (private, without NORESERVE) gets
  VM.ACCOUNT; one that is no longer writable loses it only if it is anonymous, has no anon_vma and the rule
  "mprotect_unaccounts" is in mm.rules. If no flag changes, nothing happens to this vma.
- the part becomes one with the vma before it (if it starts where its vma starts), the one behind (if it ends
  where its vma ends) or both, if they touch and flags and file go together; else it is split off, front
  first, then tail (each split at mm.max_map_count: ENOMEM).
  Their anon_vmas must suit each other. With "merge_unfaulted_target" in mm.rules: equal, or one has none and
  the other's vma is not fork_child. Without: equal, or one has none and the neighbour has one and is not
  fork_child. Both at once only if the two neighbours have the same anon_vma or one has none; else the one
  before.
- entries: a private page loses its write permission (a TLB flush is owed); if the vma is writable now, a page
  that is exclusive gets it back at once, without a fault.""",
        (
            ("middle, and back", _SIX + "write a[0:6]\nmprotect a[2:4] r\nmprotect a[2:4] rw\n"),
            ("edges", _SIX + "write a[0]\nmprotect a[0:2] r\nmprotect a[4:6] r\nmprotect a[2:4] r\n"
             "mprotect a[3:5] rw\nmprotect a[1:6] none\n"),
            ("holes", _SIX + "munmap a[3]\nmprotect a[0:6] r\nmprotect arena[0:2] rw\nmprotect arena[2:6] rw\n"
             "mprotect arena[8:12] r\n"),
            ("refused", _SIX + "mprotect a[0]+1~4096 r\nmprotect a[0]~0 r\nmprotect a[0]~1 r\n"),
            ("exclusive", _SIX + "write a[0:3]\nread a[3]\nq = fork\nwrite a[0]\nmprotect a[0:6] r\n"
             "mprotect a[0:6] rw\nq: mprotect a[0:6] r\nq: mprotect a[0:6] rw\n"),
            ("two anon_vmas", "mmap 2 at arena[0] rw private anon fixed\n"
             "mmap 2 at arena[4] rw private anon fixed\n"
             "write arena[0]\nwrite arena[4]\nmmap 2 at arena[2] r private anon fixed\nmprotect arena[2:4] rw\n"
             "mprotect arena[2:4] r\nmprotect arena[4:6] r\nmprotect arena[2:4] rw\nmprotect arena[4:6] rw\n"),
            ("accounting", "mmap 4 at arena[0] r private anon fixed\nmprotect arena[1:3] rw\n"
             "mprotect arena[1:3] r\n"
             "mprotect arena[1:3] rw\nwrite arena[1]\nmprotect arena[1:3] r\n"),
            ("the vma limit", _SIX + "mmap 1 at arena[20] rw private anon fixed\nmprotect a[2:4] r\n"
             "mprotect a[0:2] r\n"
             "mprotect a[2:4] r\nmprotect a[4] r\n"),
        ),
        "split-merge.md",
    ),
    "dontneed": Text(
        "dontneed", "mm: MiniMm, start: int, length: int", "int", "Keep the range, drop the data",
        """\
madvise(start, length, MADV_DONTNEED): 0 or -errno.

`start` not a multiple of PAGE: EINVAL. The length is rounded up; 0 is no error.
The present pages of the range go (a TLB flush is owed), the vmas stay as they are. Holes are skipped, and give
ENOMEM at the end. A vma that is VM.LOCKED: EINVAL, at once; what lies before it is done.""",
        (
            ("in a vma", _SIX + "write a[0:6]\nread a[5]\nmadvise a[1:3] dontneed\nmadvise a[0:6] dontneed\n"),
            ("over a hole", _SIX + "write a[0:6]\nmunmap a[2:4]\nmadvise a[0:6] dontneed\n"
             "madvise arena[20:22] dontneed\n"
             "write a[5]\nmadvise arena[9:14] dontneed\n"),
            ("locked", _SIX + "write a[0:6]\nmlock a[3]\nmadvise a[0:6] dontneed\nmadvise a[4:6] dontneed\n"),
            ("refused", _SIX + "write a[0:2]\nmadvise a[0]+1~4096 dontneed\nmadvise a[0]~0 dontneed\n"
             "madvise a[0]~4097 dontneed\n"),
            ("shared with a child", _SIX + "write a[0:3]\nq = fork\nq: madvise a[0:2] dontneed\nwrite a[0]\n"),
        ),
        "dontneed.md",
    ),
    "fork": Text(
        "fork", "mm: MiniMm, child: MiniMm", "None", "Copy an address space",
        """\
Fill `child`, which is empty, with a copy of `mm`; its frames are the same ones. Returns nothing.

- vmas: all but those with VM.DONTCOPY (vma.copy()); VM.LOCKED is not inherited. The child's vma has an
  anon_vma (any number) and is fork_child if the parent's has one; one with VM.WIPEONFORK has none.
- entries: copied only for vmas that have an anon_vma and not VM.WIPEONFORK: all others a fault can fill again
  (so a page that was only read, the zero page, is not copied where nothing was ever written).
- in a private vma that is not shared, the entries of both lose their write permission and are no longer
  exclusive: the first writer copies. A TLB flush is owed for the parent.""",
        (
            ("written and read", _SIX + "write a[0:3]\nread a[4]\nq = fork\nq: write a[0]\nr = fork\n"),
            ("only read", _SIX + "read a[0:3]\nq = fork\n"),
            ("shared", "a = mmap 3 at arena[0] rw shared anon fixed\nwrite a[0:2]\nq = fork\n"),
            ("advice", _SIX + "write a[0:6]\nmadvise a[0:2] dontfork\nmadvise a[2:4] wipeonfork\n"
             "mlock a[5]\nq = fork\n"
             "r = fork\n"),
            ("read-only, and a grandchild", _SIX + "write a[0:4]\nmprotect a[1] r\nq = fork\n"
             "q: write a[0]\nq: r = fork\n"
             "q: exit\nwrite a[2]\ns = fork\n"),
            ("a file", "f = memfd 8\npwrite f[0:8]\na = mmap 4 at arena[0] rw private fixed file f\nread a[0]\n"
             "b = mmap 4 at arena[8] rw private fixed file f\nread b[0]\nwrite b[1]\nq = fork\n"),
        ),
        "fork.md",
    ),
}  # fmt: skip
