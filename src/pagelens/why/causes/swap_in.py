"""Swap-in: an anonymous page had been written to swap (do_swap_page). From the swap cache it is a minor
fault.
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary, returned
from pagelens.why.evidence import Area, Evidence, Guarded, Mark, Prior
from pagelens.why.verdict import CERTAIN, LIKELY


def _holds(e: Evidence) -> Finding | None:
    if returned(e) and e.mark is Mark.NONE and e.guarded is Guarded.BACK_DISK:
        return Finding("a read had brought the page back from swap, and left it read-only", LIKELY)
    if not (ordinary(e) and not e.present and e.mark is Mark.NONE):
        return None
    if e.prior is Prior.SWAPPED:
        return Finding("the snapshot shows the page in swap", CERTAIN)
    if e.prior is Prior.ANON and e.major and e.area in (Area.ANON, Area.FILE):
        return Finding("major fault on a page of one's own that had been present: read from swap", LIKELY)
    return None


RULE = Rule(
    "swap-in", "read back from swap", "mlock what must not wait, or give the process more memory", _holds
)
