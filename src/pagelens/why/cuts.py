"""Calls that take pages out of a file, and so out of every mapping of it: ftruncate, truncate, fallocate, MADV_REMOVE,
opening with O_TRUNC.

truncate_pagecache() unmaps from the first whole page behind the new end on, private copies included (even_cows of
unmap_mapping_range, mm/memory.c); a hole (truncate_pagecache_range, shmem_fallocate) leaves private copies where they
are. Collapsing and inserting shift what is behind, and drop all of it. A call that makes a file longer cuts behind an
end that nobody could have touched: the same words hold.
"""

from __future__ import annotations

from typing import NamedTuple

from pagelens.vm.units import page_down, page_up
from pagelens.why.evidence import Area, Origin
from pagelens.why.facts import Call
from pagelens.why.files import device
from pagelens.why.space import Space

_COLLAPSE, _INSERT, _PUNCH, _ZERO = 8, 0x20, 2, 0x10
_END = 1 << 62
OPENING = frozenset({"open", "openat", "openat2", "creat"})
CUTTING = OPENING | {"ftruncate", "truncate", "fallocate"}


class FileCut(NamedTuple):
    """Bytes [start, end) of the file (dev as in maps, inode) that leave the page cache."""

    file: tuple[str, int]
    start: int
    end: int
    copies: bool  # private copies too


def file_cut(call: Call) -> FileCut | None:
    """What a call takes out of a file; None where it takes nothing, failed, or its file is not known."""
    if call.name not in CUTTING or call.result < 0 or not call.inode:
        return None
    file = (device(call.dev), call.inode)
    if call.name in OPENING:  # the recorder gives it a file only where it has emptied that
        return FileCut(file, 0, _END, True)
    if call.name in ("ftruncate", "truncate"):
        return FileCut(file, page_up(call.args[1]), _END, True)
    mode, offset, length = call.args[1:4]
    if mode & (_COLLAPSE | _INSERT):
        return FileCut(file, page_down(offset), _END, True)
    if mode & (_PUNCH | _ZERO):
        return FileCut(file, page_up(offset), page_down(offset + length), False)
    return None


def removed(space: Space, call: Call) -> list[FileCut]:
    """The holes that MADV_REMOVE makes in files (madvise_remove, mm/madvise.c): they are in every mapping of them."""
    if call.name != "madvise" or call.args[2] != 9 or call.result < 0:
        return []
    start, end = call.args[0], call.args[0] + page_up(call.args[1])
    out = []
    for seg in space.segs[max(space.index(start), 0) :]:
        if seg.start >= end:
            break
        state = space.lives.states[seg.state]
        if seg.end > start and state.file:
            low, high = max(start, seg.start) + state.shift, min(end, seg.end) + state.shift
            out.append(FileCut(state.file, low, high, False))
    return out


def cut(space: Space, what: FileCut, call: Call) -> None:
    """What `call` took out of a file leaves the mappings of it here."""
    for seg in list(space.segs):
        state = space.lives.states[seg.state]
        if state.file != what.file:
            continue
        start = max(seg.start, what.start - state.shift)
        end = min(seg.end, what.end - state.shift)
        if start < end and state.area is Area.FILE and not what.copies:
            space.hole(start, end, call.start)
        elif start < end:
            space.drop(start, end, call.start, call.seq, Origin.CUT)
