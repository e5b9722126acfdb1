"""First read of anonymous memory: the zero page is mapped, read-only (do_anonymous_page, mm/memory.c)."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, fresh, ordinary
from pagelens.why.evidence import Area, Evidence, Huge, Prior


def _holds(e: Evidence) -> Finding | None:
    untouched = not e.present and e.prior is Prior.NONE and fresh(e) and not e.grew
    if not (
        ordinary(e)
        and e.area is Area.ANON
        and not e.write
        and untouched
        and e.huge in (Huge.NO, Huge.PERHAPS)
    ):
        return None
    return Finding("read of an absent page that nothing had touched: the shared zero page is mapped")


RULE = Rule(
    "first-read",
    "first read of anonymous memory (zero page)",
    "a later write faults again; populate with MADV_POPULATE_WRITE if it will be written",
    _holds,
)
