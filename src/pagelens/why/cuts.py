"""Calls that take pages out of a file, and so out of every mapping of it: ftruncate, fallocate.

truncate_pagecache() unmaps from the first whole page behind the new end on, private copies included (even_cows of
unmap_mapping_range, mm/memory.c); a hole (truncate_pagecache_range, shmem_fallocate) leaves private copies where they
are. Collapsing and inserting shift what is behind, and drop all of it. A call that makes a file longer cuts behind an
end that nobody could have touched: the same words hold.
"""

from __future__ import annotations

from typing import NamedTuple

from pagelens.vm.units import page_down, page_up
from pagelens.why.facts import Call
from pagelens.why.files import device

_COLLAPSE, _INSERT, _PUNCH, _ZERO = 8, 0x20, 2, 0x10
_END = 1 << 62


class FileCut(NamedTuple):
    """Bytes [start, end) of the file (dev as in maps, inode) that leave the page cache."""

    file: tuple[str, int]
    start: int
    end: int
    copies: bool  # private copies too


def file_cut(call: Call) -> FileCut | None:
    """What a call takes out of a file; None where it takes nothing, failed, or its file is not known."""
    if call.name not in ("ftruncate", "fallocate") or call.result < 0 or not call.inode:
        return None
    file = (device(call.dev), call.inode)
    if call.name == "ftruncate":
        return FileCut(file, page_up(call.args[1]), _END, True)
    mode, offset, length = call.args[1:4]
    if mode & (_COLLAPSE | _INSERT):
        return FileCut(file, page_down(offset), _END, True)
    if mode & (_PUNCH | _ZERO):
        return FileCut(file, page_up(offset), page_down(offset + length), False)
    return None
