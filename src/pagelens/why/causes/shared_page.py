"""A page of shared memory is mapped, and allocated if nobody had touched it (shmem_fault, mm/shmem.c).

Fork copies no page tables of shared memory, so each process faults for itself.
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, fresh, ordinary
from pagelens.why.evidence import Area, Evidence, Huge


def _holds(e: Evidence) -> Finding | None:
    if not (ordinary(e) and e.area is Area.SHMEM and not e.present and fresh(e)):
        return None
    if e.huge is Huge.MADE:
        return None
    return Finding("absent page of shared memory: mapped, and allocated if no process had touched it")


RULE = Rule(
    "shared-page",
    "page of shared memory mapped",
    "each process maps it for itself; MAP_POPULATE or MADV_POPULATE_WRITE does it in one call, huge "
    "pages in fewer",
    _holds,
)
