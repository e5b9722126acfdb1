"""Spurious faults: by the time the kernel looked, the page was as wanted (another thread, or a stale TLB
entry).
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, allowed, ordinary, overtaken, private
from pagelens.why.evidence import Area, Evidence, Forked, Guarded, Prior, Race
from pagelens.why.verdict import LIKELY


def _holds(e: Evidence) -> Finding | None:
    if e.failed or e.uffd or e.area is Area.UNSEEN:
        return None
    if e.race is Race.THREAD:
        return Finding("another thread's fault on the same page completed while this one was under way")
    if overtaken(e):
        why = "less than 1 ms before the kernel looked at this fault another thread's had mapped the page"
        return Finding(why, LIKELY)
    if not (ordinary(e) and e.present and allowed(e)) or e.area in (
        Area.UNMAPPED,
        Area.SPECIAL,
        Area.HUGETLB,
    ):
        return None
    if not e.write:
        return Finding("read of a present page that the rights allow: a stale TLB entry", LIKELY)
    if e.rearmed or e.guarded is not Guarded.NONE:
        return None
    if e.area is Area.SHMEM or (private(e) and e.prior is Prior.ANON and e.forked is Forked.NONE):
        return Finding("the page was writable already: a stale TLB entry", LIKELY)
    return None


RULE = Rule(
    "spurious",
    "already resolved (race between threads, stale TLB)",
    "let one thread touch shared memory first; nothing is lost but the fault's time",
    _holds,
)
