"""Private page of a file, copied on write: initialised data, relocations (do_cow_fault if absent, else
do_wp_page).
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, fresh, ordinary
from pagelens.why.evidence import Area, Evidence, Prior


def _holds(e: Evidence) -> Finding | None:
    clean = e.prior in (Prior.NONE, Prior.FILE, Prior.POPULATED)
    if not (ordinary(e) and e.area is Area.FILE and e.write and clean):
        return None
    if not e.present and not fresh(e):
        return None
    if e.present:
        return Finding("write to a present read-only page of a private file mapping: it had been read first")
    return Finding("write to an absent page of a private file mapping: copied straight from the page cache")


RULE = Rule(
    "file-cow",
    "private file page copied on write",
    "make the data const where it does not change; prelink or use -z now/-Bsymbolic for "
    "relocations; share what "
    "need not be private (MAP_SHARED)",
    _holds,
)
