"""Evidence: everything a cause may look at, for one fault, as a handful of small values.

Why small values: a million faults have a few dozen different evidences. The replay packs each fault's
evidence into one integer, numpy finds the distinct ones, and the rules, plain functions of one `Evidence`,
run once for each. So the rules read like sentences and still judge a million faults in well under a second.
Rejected: rules as numpy masks (fast, but nobody can check one by reading it); a rule call per fault (minutes
for a million).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class Area(enum.IntEnum):
    """What is mapped at the address when the fault comes."""

    UNMAPPED = 0
    ANON = 1  # private, no file: heap, stack, malloc, bss
    FILE = 2  # private file mapping
    SHARED_FILE = 3
    SHMEM = 4  # shared anonymous memory, memfd, /dev/shm, System V: page cache without a disk behind
    HUGETLB = 5
    SPECIAL = 6  # vdso, vvar, device memory
    UNSEEN = 7  # mapped before the recording began, and no first snapshot tells what


class Prior(enum.IntEnum):
    """What is known of the page before the fault, in its present life (since mapped, dropped or copied)."""

    NONE = 0
    ZERO = 1  # read before: the zero page stands there
    FILE = 2  # a page of the file is mapped (private or shared)
    ANON = 3  # written before: a page of its own
    SWAPPED = 4
    POPULATED = 5  # a call made it present (mlock, MAP_POPULATE, MADV_POPULATE_*)
    SHARED = 6  # shared memory, touched before


class Origin(enum.IntEnum):
    """How the present life of the page's range began."""

    SNAPSHOT = 0  # it was there when the recording of this address space began
    MMAP = 1
    BRK = 2
    GROWTH = 3  # stack growth
    DONTNEED = 4
    FORK = 5
    MREMAP = 6
    UNSEEN = 7
    CUT = 8  # ftruncate or fallocate took the pages out of the file


class Mark(enum.IntEnum):
    """Advice given since the page was last touched."""

    NONE = 0
    FREE = 1
    PAGEOUT = 2
    COLD = 3


class Gone(enum.IntFlag):
    """What a page of a file or of shared memory, absent now, may have been before: several where nothing decides."""

    FRESH = 1  # never mapped
    DONTNEED = 2  # mapped, until MADV_DONTNEED or its like
    CUT = 4  # until its file was cut, or got a hole
    PAGEOUT = 8  # until MADV_PAGEOUT


class Forked(enum.IntEnum):
    """Whether a fork write-protected the page since its last write."""

    NONE = 0
    PARENT = 1  # this address space forked after it wrote the page
    CHILD = 2  # the page came by fork


class Sharers(enum.IntEnum):
    """Other address spaces that map the same page at that time."""

    NA = 0
    LIVE = 1  # at least one is alive and has not got its own copy
    GONE = 2  # all have exited, exec'd, written or dropped theirs
    UNCLEAR = 3  # one was exiting just then
    UNSEEN = 4  # forked before the recording, so nobody knows


class Outcome(enum.IntEnum):
    """Copied or reused: by what the kernel took for the fault, or by the frame numbers of two snapshots."""

    UNDECIDED = 0
    COPIED = 1
    REUSED = 2


class Race(enum.IntEnum):
    """Something else that touched the page or its range while the fault was handled."""

    NONE = 0
    THREAD = 1  # another thread's fault on the same page completed within this one
    CALL = 2  # another thread's memory system call on this range overlapped it
    MAYBE = 4  # no latencies: another thread's fault on the same page was just before it
    HANDLER = 3  # a userfaultfd ioctl overlapped it
    LATE = 5  # another thread's fault mapped the same page just before this one's handler began


class Guarded(enum.IntEnum):
    """Who had write-protected a page that its process owned, since its last write.

    A page that had gone may come back read-only: by a NUMA hint fault, read or write, that migrates it (the migration
    entry of a page that was PROT_NONE is a readable one), and from swap by a read, on some kernels.
    """

    NONE = 0
    UFFD = 1  # UFFDIO_WRITEPROTECT, or PAGEMAP_SCAN with PM_SCAN_WP_MATCHING
    CLEARED = 2  # a 4 in clear_refs, on a kernel with soft-dirty
    KSM = 3  # same-page merging was allowed on it
    BACK = 4  # the fault before this one, which brought the page back
    BACK_DISK = 5  # likewise, and a major one: from swap


class Huge(enum.IntEnum):
    """What is known of the 2 MiB block around the page."""

    NO = 0  # huge pages cannot be here, or other faults in the block rule one out
    MADE = 1  # this fault made a huge page: the last snapshot shows it, or it was alone in the block and slow
    READ = 2  # the huge zero page stands here since an earlier read
    INSIDE = 3  # an earlier fault of the block made a huge page
    PERHAPS = 4  # as MADE, but whether nothing stood in the block before is not known


class Cut(enum.IntEnum):
    """What `--max-size` may have dropped of the page's story."""

    NONE = 0
    MAPPING = 1  # the call that mapped it, perhaps; a fault of the page is at hand
    HISTORY = 2  # earlier faults and calls too


@dataclass(frozen=True, slots=True)
class Evidence:
    """One fault, as the rules see it. Booleans are 0 or 1 in the packed form."""

    known: bool  # the error code was recorded
    present: bool  # error code bit 0: a page table entry was there, and forbade it
    write: bool
    exec: bool
    user: bool  # taken in user mode
    in_call: bool  # taken by the kernel within a system call
    failed: bool
    major: bool
    area: Area
    readable: bool
    writable: bool
    executable: bool
    grew: bool  # below a stack that could grow to it
    prior: Prior
    origin: Origin
    dropped: bool  # touched before DONTNEED (or the like) took it away
    paged: bool  # MADV_PAGEOUT was asked for it before that, and may have taken it
    gone: Gone  # where it is not 0, it says all of dropped, paged and mark
    near: bool  # no fault of its own had mapped it: that of a neighbour, most likely
    mark: Mark
    forked: Forked
    sharers: Sharers
    outcome: Outcome
    race: Race
    huge: Huge
    guarded: Guarded
    uffd: bool  # a userfaultfd had to do with it, as far as evidence goes
    numa: bool  # NUMA balancing was on
    rearmed: bool  # mprotect changed the rights after the page was last touched
    flushed: bool  # shared file: synced, or long enough ago that writeback may have cleaned it
    was_mapped: bool  # unmapped now, but something was mapped there earlier
    by_exec: bool  # taken in execve, before the new program ran
    unsure: bool  # what is known of the page before rests on a fault whose access was not recorded
    uncalled: bool  # calls were not recorded, nor what the kernel touched for them
    zeroed: bool  # perhaps the zero page by now: given away by MADV_FREE, and read again
    inferred: bool  # the error code was not recorded; the last snapshot tells the access
    cut: Cut


# Widths in bits, in the order of the fields; decoding is generated from it.
_ENUMS: dict[str, type[enum.IntEnum] | type[enum.IntFlag]] = {
    "area": Area,
    "prior": Prior,
    "origin": Origin,
    "gone": Gone,
    "mark": Mark,
    "forked": Forked,
    "sharers": Sharers,
    "outcome": Outcome,
    "race": Race,
    "huge": Huge,
    "guarded": Guarded,
    "cut": Cut,
}
FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Evidence))
_WIDTH = {name: (max(_ENUMS[name]).bit_length() if name in _ENUMS else 1) for name in FIELDS}


def _places() -> dict[str, tuple[int, int]]:
    # Which byte, and by how many bits shifted: no field lies in two bytes, so that a million rows are packed a byte
    # at a time. The top byte stays clear of the sign.
    free = [8] * 7 + [7]
    out = {}
    for name in sorted(FIELDS, key=lambda n: -_WIDTH[n]):
        byte = next(i for i, bits in enumerate(free) if bits >= _WIDTH[name])
        out[name] = (byte, (8 if byte < 7 else 7) - free[byte])
        free[byte] -= _WIDTH[name]
    return out


_PLACE = _places()


def pack(columns: dict[str, npt.NDArray[np.generic] | int]) -> I64:
    """int64[n], one packed evidence a row. columns: a value or an array of n for every field of
    `Evidence`.
    """
    length = max(len(c) for c in columns.values() if isinstance(c, np.ndarray))
    out = np.empty((length, 8), np.uint8)
    for byte in range(8):
        whole = np.zeros(length, np.uint8)
        for name in FIELDS:
            if _PLACE[name][0] != byte:
                continue
            column = columns[name]
            if not isinstance(column, np.ndarray):
                whole |= np.uint8(int(column) << _PLACE[name][1])
            else:
                values = column.view(np.uint8) if column.dtype == bool else column.astype(np.uint8)
                whole |= values << np.uint8(_PLACE[name][1])
        out[:, byte] = whole
    return out.view("<i8").ravel()


def unpack(code: int) -> Evidence:
    """The `Evidence` of one packed value."""
    values: dict[str, object] = {}
    for name in FIELDS:
        byte, shift = _PLACE[name]
        raw = (code >> (8 * byte + shift)) & ((1 << _WIDTH[name]) - 1)
        values[name] = _ENUMS[name](raw) if name in _ENUMS else bool(raw)
    return Evidence(**values)  # type: ignore[arg-type]


def evidence(**given: object) -> Evidence:
    """An ordinary user-mode read of an absent page of readable, writable anonymous memory, but for
    `given`.
    """
    values: dict[str, object] = {name: (_ENUMS[name](0) if name in _ENUMS else False) for name in FIELDS}
    values |= {"known": True, "user": True, "area": Area.ANON, "readable": True, "writable": True}
    values["origin"] = Origin.MMAP
    return Evidence(**(values | given))  # type: ignore[arg-type]
