"""What a change of a page's state means, and what it does to the fields of smaps.

Pure: states in, words and bytes out. pagemap does not show the dirty bit, so a file page counts as clean
here and an anonymous one as dirty, as smaps does for pages that nobody swapped or cleaned; `diff` prints
what that leaves unexplained rather than hiding it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import U32, PageState

FIELDS = ("Rss", "Anonymous", "Private_Clean", "Private_Dirty", "Shared_Clean", "Shared_Dirty", "Swap")
_P, _S, _F, _X = PageState.PRESENT, PageState.SWAPPED, PageState.FILE, PageState.EXCLUSIVE
_Z, _G, _H = PageState.ZERO, PageState.GUARD, PageState.HUGE
# Bits that say nothing about residency, and are left out when states are compared.
SHOWN = _P | _S | _F | _X | _Z | _G | _H


def contribution(state: U32) -> dict[str, npt.NDArray[np.bool_]]:
    """Field -> whether a page of each state counts in it (bool[n])."""

    def has(bit: PageState) -> npt.NDArray[np.bool_]:
        return np.asarray((state & np.uint32(bit)) != 0)

    resident = has(_P) & ~has(_Z)
    private, file = has(_X), has(_F)
    return {
        "Rss": resident,
        "Anonymous": resident & ~file,
        "Private_Clean": resident & private & file,
        "Private_Dirty": resident & private & ~file,
        "Shared_Clean": resident & ~private & file,
        "Shared_Dirty": resident & ~private & ~file,
        "Swap": has(_S) & ~has(_G),
    }


def effect(before: int, after: int, *, memory: bool = False) -> dict[str, int]:
    """Field -> bytes that one page's change adds to it; only fields that change. memory: of shared memory, whose pages
    count as dirty once they were written, and no file has them."""
    old, new = contribution(np.array([before], np.uint32)), contribution(np.array([after], np.uint32))
    out = {f: (int(new[f][0]) - int(old[f][0])) * 4096 for f in FIELDS}
    if memory:
        for kind in ("Private", "Shared"):
            out[f"{kind}_Dirty"] += out.pop(f"{kind}_Clean")
    return {f: v for f, v in out.items() if v}


def describe(before: int, after: int, *, file_vma: bool, copied: bool = False, memory: bool = False) -> str:
    """One sentence on a change of state. file_vma: the vma maps a file privately. copied: another frame
    now. memory: shared memory."""
    old, new = PageState(before), PageState(after)
    if not new & (_P | _S | _G):
        if old & _G:
            return "guard removed"
        return "dropped: given back by madvise, munmap or reclaim" if old & _P else "swap entry dropped"
    if new & _G:
        return "guard installed: an access kills"
    if new & _S:
        return "swapped out" if old & _P else "not present: swap, migration entry or marker"
    if old & _S and not old & _P:
        return "swapped in"
    if new & _Z:
        return "first read: the zero page is mapped, which is in no field of smaps"
    if not old & _P:
        return "page of shared memory mapped" if memory and new & _F else _first(new, file_vma)
    if old & _Z:
        return "written after a read: a new page replaces the zero page, so Rss grows now"
    if old & _F and not new & _F:
        return (
            "written after a read: the private copy replaces the page of the page cache, so Rss stays "
            "and clean becomes dirty and anonymous"
        )
    if copied:
        return "copied: another frame with the same state"
    if old & _X and not new & _X:
        return "mapped by somebody else too now (fork, or another mapping of the file)"
    if new & _X and not old & _X:
        return "mapped only here now: copied on write, or the other mapping went"
    if (old ^ new) & _H:
        return "part of a huge page now" if new & _H else "its huge page was split"
    return "changed"


def compare(before: int, after: int, *, copied: bool) -> str:
    """One sentence on a page of two processes: nothing has happened between them, they differ."""
    old, new = PageState(before), PageState(after)
    if bool(old & _P) != bool(new & _P):
        return "present in the first only" if old & _P else "present in the second only"
    if not old & _P:
        return "swapped out or marked in one of them"
    if (old ^ new) & _Z:
        return f"the zero page in the {'first' if old & _Z else 'second'}, a page of its own in the other"
    if (old ^ new) & _F:
        return f"the file's page in the {'first' if old & _F else 'second'}, a private copy in the other"
    if copied:
        return "each has a page of its own"
    if (old ^ new) & _X:
        return f"mapped nowhere else in the {'first' if old & _X else 'second'}, shared in the other"
    if (old ^ new) & _H:
        return f"part of a huge page in the {'first' if old & _H else 'second'} only"
    return "different"


def _first(new: PageState, file_vma: bool) -> str:
    if new & _F:
        return "mapped from the page cache, read-only or shared: clean"
    if file_vma:
        return "written first: copied straight from the file, dirty and anonymous from the start"
    if new & _H:
        return "first write: a new huge page"
    return "first write: a new page of zeros"


def refine(what: str, before: int, after: int, file_vma: bool, chain: list[str]) -> str:
    """`describe` with the page's own faults between the two moments: read first, or written first?"""
    old, new = PageState(before), PageState(after)
    fresh = not old & (_P | _S) and new & _P and not new & (_F | _Z)
    if not fresh or len(chain) < 2 or not chain[0].startswith(("read", "exec")):
        return what
    if not any(text.startswith("write") for text in chain[1:]):
        return what
    if file_vma:
        return (
            "read first, then written: mapped read-only from the page cache, then copied, so the copy is dirty "
            "and anonymous"
        )
    return "read first, then written: the zero page, then a page of its own"
