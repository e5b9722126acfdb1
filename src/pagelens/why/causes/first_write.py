"""First write to anonymous memory: the kernel allocates a zeroed page (do_anonymous_page, mm/memory.c)."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, fresh, ordinary
from pagelens.why.evidence import Area, Evidence, Huge, Origin, Prior


def _holds(e: Evidence) -> Finding | None:
    untouched = not e.present and e.prior is Prior.NONE and fresh(e) and not e.grew
    if not (
        ordinary(e) and e.area is Area.ANON and e.write and untouched and e.huge in (Huge.NO, Huge.PERHAPS)
    ):
        return None
    how = {
        Origin.MMAP: "mapped by mmap",
        Origin.BRK: "heap grown by brk",
        Origin.FORK: "mapped before the fork, and untouched there",
        Origin.MREMAP: "new part of an mremap",
        Origin.GROWTH: "part of the grown stack",
    }.get(e.origin, "mapped since the address space began")
    return Finding(f"write to an absent page ({how}) that nothing had touched")


RULE = Rule(
    "first-write",
    "first write to anonymous memory",
    "touch or populate before the critical part (MAP_POPULATE, MADV_POPULATE_WRITE), reuse memory instead of "
    "freeing it, or use huge pages for large blocks",
    _holds,
)
