"""Write over the zero page: it was read first, now it gets a page of its own (do_wp_page, wp_page_copy)."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary
from pagelens.why.evidence import Area, Evidence, Forked, Huge, Prior
from pagelens.why.verdict import LIKELY


def _holds(e: Evidence) -> Finding | None:
    if not (ordinary(e) and e.area in (Area.ANON, Area.FILE) and e.write and e.present):
        return None
    unshared = e.dropped or e.forked is Forked.NONE
    if e.area is Area.ANON and e.prior is Prior.NONE and e.huge is Huge.NO and unshared:
        # get_user_pages for reading (vmsplice, process_vm_readv, a debugger) maps the zero page without a fault event.
        return Finding(
            "write to a present read-only page that no fault had mapped: a call's read had", LIKELY
        )
    if e.zeroed and e.prior is Prior.ANON:
        return Finding(
            "MADV_FREE had given the page away; if it was taken, the zero page stood there", LIKELY
        )
    if not (e.prior is Prior.ZERO or (e.huge is Huge.READ and e.prior is Prior.NONE)):
        return None
    return Finding("write to a present read-only page that had only been read: the zero page stood there")


RULE = Rule(
    "zero-page-write",
    "write over the zero page",
    "write first, or populate with MADV_POPULATE_WRITE: then one fault instead of two",
    _holds,
)
