"""Huge page mapped: one fault gives 2 MiB (do_huge_pmd_anonymous_page), at the price of zeroing them at
once.
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary
from pagelens.why.evidence import Area, Evidence, Huge, Prior
from pagelens.why.verdict import LIKELY


def _huge(e: Evidence) -> Finding | None:
    fits = e.area in (Area.ANON, Area.SHMEM) and not e.present and e.prior is Prior.NONE
    if not (ordinary(e) and fits and e.huge in (Huge.MADE, Huge.PERHAPS) and not e.dropped):
        return None
    return Finding("first fault of a 2 MiB block in which no other page faulted afterwards", LIKELY)


def _hugetlb(e: Evidence) -> Finding | None:
    if not (ordinary(e) and e.area is Area.HUGETLB):
        return None
    return Finding("page of a hugetlb mapping (hugetlb_fault)")


RULE = Rule(
    "huge-page",
    "huge page mapped",
    "saves up to 511 faults and costs 2 MiB of memory at once; MADV_NOHUGEPAGE where little of it is used",
    _huge,
)
RULE_HUGETLB = Rule("hugetlb", "page of hugetlbfs mapped", "MAP_POPULATE maps all at once", _hugetlb)
