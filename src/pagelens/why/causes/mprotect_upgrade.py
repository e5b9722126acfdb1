"""First write after mprotect gave the right back: the kernel left the entry read-only
(can_change_pte_writable).
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary
from pagelens.why.evidence import Area, Evidence, Forked, Prior
from pagelens.why.verdict import LIKELY


def _holds(e: Evidence) -> Finding | None:
    mine = e.area is Area.SHMEM or (
        e.area in (Area.ANON, Area.FILE) and e.prior is Prior.ANON and e.forked is Forked.NONE
    )
    if not (ordinary(e) and mine and e.write and e.present and e.rearmed):
        return None
    return Finding(
        "write to a present page whose entry stayed read-only after mprotect allowed writing", LIKELY
    )


RULE = Rule(
    "mprotect-upgrade",
    "first write after mprotect allowed it",
    "change rights less often; a generation or card table instead of page protection",
    _holds,
)
