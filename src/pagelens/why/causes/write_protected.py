"""First write to a page that the kernel had write-protected for a purpose of its own: soft-dirty tracking, or same-page
merging.

clear_soft_dirty (fs/proc/task_mmu.c) protects every page, so that the next write of each faults once and marks it.
KSM protects what it merges (write_protect_page, mm/ksm.c), and a write gets a copy.
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary
from pagelens.why.evidence import Area, Evidence, Forked, Guarded, Prior
from pagelens.why.verdict import LIKELY


def _mine(e: Evidence, by: Guarded) -> bool:
    own = e.area is Area.SHMEM or (
        e.area in (Area.ANON, Area.FILE)
        and e.prior in (Prior.ANON, Prior.POPULATED)
        and e.forked is Forked.NONE
    )
    return ordinary(e) and own and e.write and e.present and e.guarded is by and not e.rearmed


def _cleared(e: Evidence) -> Finding | None:
    if not _mine(e, Guarded.CLEARED):
        return None
    return Finding("first write since a 4 was written to clear_refs: that write-protects all pages", LIKELY)


def _merged(e: Evidence) -> Finding | None:
    if not _mine(e, Guarded.KSM):
        return None
    return Finding("write to a page that KSM was allowed to merge, and had write-protected", LIKELY)


RULE = Rule(
    "soft-dirty",
    "first write after clear_refs (soft-dirty tracking)",
    "the price of tracking by soft-dirty; PAGEMAP_SCAN with asynchronous write protection is cheaper (dirty --backend)",
    _cleared,
)
RULE_KSM = Rule(
    "ksm-cow",
    "write to a page that KSM had merged",
    "MADV_UNMERGEABLE for memory that is written; echo 2 > /sys/kernel/mm/ksm/run undoes all merging",
    _merged,
)
