"""Special mappings: vdso, vvar, device memory. Their pages come from a driver or the kernel image."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary
from pagelens.why.evidence import Area, Evidence


def _holds(e: Evidence) -> Finding | None:
    if not (ordinary(e) and e.area is Area.SPECIAL):
        return None
    return Finding("the vma is a special mapping: its page is the kernel's or a device's own")


RULE = Rule("special-page", "page of vdso, vvar or a device mapped", "none needed: once a process", _holds)
