"""A file's page is mapped, from the page cache or read from disk; reads map up to 16 neighbours with it
(do_fault_around, filemap_map_pages). A fault counts as major where the kernel read, but also where it had to
retry after waiting for a lock: so "from disk" is likely, never certain."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, fresh, ordinary
from pagelens.why.evidence import Area, Evidence, Prior
from pagelens.why.verdict import CERTAIN, LIKELY


def _maps_file(e: Evidence) -> bool:
    if e.area is Area.FILE:
        mapped = not e.write and e.prior in (Prior.NONE, Prior.FILE, Prior.POPULATED)
    else:
        mapped = e.area is Area.SHARED_FILE
    return ordinary(e) and mapped and not e.present and fresh(e)


def _again(e: Evidence) -> str:
    if e.prior is Prior.NONE:
        return "this process had not mapped the page before"
    return "it had been mapped before: evicted or unmapped by the kernel since"


def _cached(e: Evidence) -> Finding | None:
    if not _maps_file(e) or e.major:
        return None
    how = "write to" if e.write else "fetch from" if e.exec else "read of"
    sure = CERTAIN if e.prior is Prior.NONE else LIKELY
    return Finding(f"minor fault, {how} an absent page of a file in the page cache; {_again(e)}", sure)


def _disk(e: Evidence) -> Finding | None:
    if not _maps_file(e) or not e.major:
        return None
    return Finding(
        f"major fault on an absent page of a file: read from disk (or waited); {_again(e)}", LIKELY
    )


RULE = Rule(
    "file-page-cached",
    "file page mapped from the page cache",
    "each such fault maps up to 16 neighbouring cached pages; MAP_POPULATE or MADV_POPULATE_READ "
    "maps all at once",
    _cached,
)
RULE_DISK = Rule(
    "file-page-disk",
    "file page read from disk",
    "read ahead (MADV_WILLNEED, readahead), keep it in memory (mlock), or start with a warm cache",
    _disk,
)
