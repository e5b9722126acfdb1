"""Stack growth: an access below the main stack extends its vma (expand_stack), then the page is allocated."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary
from pagelens.why.evidence import Evidence


def _holds(e: Evidence) -> Finding | None:
    if not (ordinary(e) and e.grew and not e.present):
        return None
    return Finding("the address lay below a stack vma, which grew down to it")


RULE = Rule(
    "stack-growth",
    "the stack grew",
    "touch the stack to its later depth once, early (as real-time programs do), or mlockall(MCL_FUTURE)",
    _holds,
)
