"""Write-notify: a shared file page was clean, the filesystem wants to know of the first write (do_wp_page,
wp_page_shared, page_mkwrite). Each writeback cleans pages, and the next write faults again."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary
from pagelens.why.evidence import Area, Evidence


def _holds(e: Evidence) -> Finding | None:
    if not (ordinary(e) and e.area is Area.SHARED_FILE and e.write and e.present):
        return None
    how = "written back since its last write" if e.flushed else "read first, or cleaned since its last write"
    return Finding(f"write to a present, clean page of a shared file mapping ({how})")


RULE = Rule(
    "write-notify",
    "first write to a clean shared file page",
    "msync and background writeback clean pages and so bring the fault back; write in larger "
    "bursts, use tmpfs, "
    "or pwrite",
    _holds,
)
