"""Faults that come back because pages were given away: MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary, returned
from pagelens.why.evidence import Area, Evidence, Gone, Mark, Origin, Prior
from pagelens.why.verdict import CERTAIN, LIKELY


def _absent(e: Evidence) -> bool:
    return ordinary(e) and not e.present and e.area not in (Area.SPECIAL, Area.HUGETLB)


def _finding(e: Evidence, why: str) -> Finding:
    if not e.near:
        return Finding(why)
    return Finding(f"{why}; a fault of its own it never had, but a neighbour's, which mapped both", LIKELY)


def _taken(e: Evidence, by: Gone) -> bool:
    # One that is gone: by that, as far as evidence goes.
    if not _absent(e) or e.prior is not Prior.NONE:
        return False
    if e.gone or by is Gone.PAGEOUT:
        return by in e.gone
    return e.dropped and (e.origin is Origin.CUT) == (by is Gone.CUT)


def _dontneed(e: Evidence) -> Finding | None:
    if not _taken(e, Gone.DONTNEED):
        return None
    return _finding(e, "the page had been in use until MADV_DONTNEED (or MADV_REMOVE) dropped it")


def _cut(e: Evidence) -> Finding | None:
    if not _taken(e, Gone.CUT):
        return None
    return _finding(e, "the page had been mapped until ftruncate or fallocate took it out of the file")


def _read_back(e: Evidence, mark: Mark) -> Finding | None:
    if not (returned(e) and e.mark is mark):
        return None
    return Finding(
        f"MADV_{mark.name} had taken the page away, and the fault that brought it back left it read-only",
        LIKELY,
    )


def _free(e: Evidence) -> Finding | None:
    if found := _read_back(e, Mark.FREE):
        return found
    if not (_absent(e) and e.mark is Mark.FREE and e.prior is not Prior.NONE):
        return None
    return Finding("MADV_FREE had allowed the kernel to take the page, and it did")


def _pageout(e: Evidence) -> Finding | None:
    if found := _read_back(e, Mark.PAGEOUT):
        return found
    if _absent(e) and e.paged and e.dropped and e.prior is Prior.NONE:
        return _finding(e, "MADV_PAGEOUT had reclaimed the page, before anything dropped it")
    if _taken(e, Gone.PAGEOUT):
        return _finding(e, "MADV_PAGEOUT had reclaimed the page; it came back from its file")
    if not (_absent(e) and e.mark is Mark.PAGEOUT and e.prior is not Prior.NONE):
        return None
    sure = CERTAIN if e.major or e.prior is Prior.SWAPPED else LIKELY
    return Finding("MADV_PAGEOUT had reclaimed the page; it came back from swap or its file", sure)


def _cold(e: Evidence) -> Finding | None:
    if found := _read_back(e, Mark.COLD):
        return found
    if not (_absent(e) and e.mark is Mark.COLD and e.prior is not Prior.NONE):
        return None
    return Finding("MADV_COLD had put the page first in line for reclaim, and it was reclaimed", LIKELY)


RULE = Rule(
    "after-dontneed",
    "touched again after MADV_DONTNEED",
    "let the allocator keep memory longer (glibc M_TRIM_THRESHOLD; jemalloc dirty_decay_ms, muzzy_decay_ms)",
    _dontneed,
)
RULE_CUT = Rule(
    "after-truncate",
    "touched again after ftruncate or a hole",
    "keep the file's length, or let who cuts it tell who maps it",
    _cut,
)
RULE_FREE = Rule("after-free", "touched again after MADV_FREE", "as after-dontneed", _free)
RULE_PAGEOUT = Rule(
    "after-pageout", "touched again after MADV_PAGEOUT", "page out only what stays cold", _pageout
)
RULE_COLD = Rule("after-cold", "touched again after MADV_COLD", "advise only what stays cold", _cold)
