"""MiniMm to JSON and back, between the grader and the process in which a student's code runs.

What comes back was changed by code that may do anything, so `dump` checks every type and says in one sentence
what is wrong. Rejected: pickle (a student's process must not decide what is executed in ours).
"""

from __future__ import annotations

import itertools
from typing import Any

from pagelens.lab.mini import PAGE, VM, Frames, MiniMm, PageTable, Pte, Vma, Vmas

_VMA_INTS = ("start", "end", "pgoff", "anon_vma")


class WrongTypeError(Exception):
    """A field of what the student's code left behind has a type or an order that cannot be."""


def load_frames(data: dict[str, Any]) -> Frames:
    """The frames of `dump_frames`."""
    frames = Frames()
    frames.mapcount = {int(k): v for k, v in data["mapcount"].items()}
    frames.anon = set(data["anon"])
    frames.cache = {f: {int(k): v for k, v in pages.items()} for f, pages in data["cache"].items()}
    frames.sizes = dict(data["sizes"])
    return frames


def dump_frames(frames: Frames) -> dict[str, Any]:
    """Frames as JSON takes them."""
    return {
        "mapcount": {str(k): v for k, v in frames.mapcount.items()},
        "anon": sorted(frames.anon),
        "cache": {f: {str(k): v for k, v in pages.items()} for f, pages in frames.cache.items()},
        "sizes": frames.sizes,
    }


def load_vma(row: list[Any]) -> Vma:
    """A vma of `dump_vma`."""
    start, end, flags, file, pgoff, anon_vma, fork_child = row
    return Vma(start, end, VM(flags), file, pgoff, anon_vma, fork_child)


def dump_vma(vma: Vma) -> list[Any]:
    """A vma as JSON takes it."""
    return [vma.start, vma.end, int(vma.flags), vma.file, vma.pgoff, vma.anon_vma, vma.fork_child]


def load(data: dict[str, Any], frames: Frames) -> MiniMm:
    """The address space of `dump`."""
    mm = MiniMm(frames)
    mm.vmas = Vmas(load_vma(row) for row in data["vmas"])
    mm.ptes.load({page: Pte(frame, bool(w), bool(e)) for page, frame, w, e in data["ptes"]})
    mm.brk, mm.start_brk, mm.mmap_base = data["brk"], data["start_brk"], data["mmap_base"]
    mm.max_map_count = data["max_map_count"]
    mm.rules = frozenset(data["rules"])
    mm.flushes = [(start, end) for start, end in data["flushes"]]
    mm.vmas.looked = 0
    return mm


def dump(mm: MiniMm) -> dict[str, Any]:
    """An address space as JSON takes it. WrongTypeError where it cannot be one."""
    if not isinstance(mm.vmas, list):
        raise WrongTypeError(f"mm.vmas is a {type(mm.vmas).__name__}; it must stay a list of Vma")
    rows = list(list.__iter__(mm.vmas))
    for vma in rows:
        _check_vma(vma)
    for low, high in itertools.pairwise(rows):
        if low.start >= high.start:
            raise WrongTypeError(f"mm.vmas is not sorted: {low.start:#x} stands before {high.start:#x}")
        if low.end > high.start:
            raise WrongTypeError(
                f"two vmas overlap: {low.start:#x}-{low.end:#x} and {high.start:#x}-{high.end:#x}"
            )
    if not isinstance(mm.ptes, PageTable):
        raise WrongTypeError(f"mm.ptes is a {type(mm.ptes).__name__}; change its entries, do not replace it")
    if type(mm.brk) is not int:
        raise WrongTypeError(f"mm.brk is a {type(mm.brk).__name__}, not an address (int)")
    return {
        "vmas": [dump_vma(v) for v in rows],
        "ptes": [_entry(page, pte) for page, pte in mm.ptes.items()],
        "brk": mm.brk,
        "start_brk": mm.start_brk,
        "mmap_base": mm.mmap_base,
        "max_map_count": mm.max_map_count,
        "rules": sorted(mm.rules),
        "flushes": [_flush(item) for item in mm.flushes],
    }


def _check_vma(vma: Any) -> None:
    if not isinstance(vma, Vma):
        raise WrongTypeError(f"mm.vmas holds a {type(vma).__name__}, not a Vma")
    for name in _VMA_INTS:
        if type(getattr(vma, name)) is not int:
            raise WrongTypeError(
                f"a vma's {name} is a {type(getattr(vma, name)).__name__} ({getattr(vma, name)!r}), not an int"
            )
    if not isinstance(vma.flags, int):
        raise WrongTypeError(f"a vma's flags are a {type(vma.flags).__name__}, not VM bits")
    if not isinstance(vma.file, str):
        raise WrongTypeError(f"a vma's file is a {type(vma.file).__name__}, not a str")
    if vma.start % PAGE or vma.end % PAGE:
        raise WrongTypeError(f"the vma {vma.start:#x}-{vma.end:#x} is not whole pages")
    if vma.start >= vma.end:
        raise WrongTypeError(f"the vma {vma.start:#x}-{vma.end:#x} is empty")


def _entry(page: Any, pte: Pte) -> list[Any]:
    if type(page) is not int or page < 0:
        raise WrongTypeError(f"mm.ptes has the key {page!r}; it takes page numbers (addr // PAGE)")
    if type(pte.frame) is not int:
        raise WrongTypeError(f"the entry of page {page:#x} has the frame {pte.frame!r}; frames are ints")
    return [page, pte.frame, bool(pte.writable), bool(pte.exclusive)]


def _flush(item: Any) -> list[int]:
    if len(item) != 2 or any(type(x) is not int for x in item):
        raise WrongTypeError(f"mm.flush_tlb takes two addresses, not {item!r}")
    return list(item)
