"""userfaultfd: the range is registered; the thread slept until a handler resolved the fault
(handle_userfault).
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule
from pagelens.why.evidence import Evidence, Race
from pagelens.why.verdict import CERTAIN, LIKELY


def _holds(e: Evidence) -> Finding | None:
    if e.failed or not e.uffd:
        return None
    if e.present and e.race is not Race.HANDLER:
        return Finding("write to a page that had been write-protected through userfaultfd", LIKELY)
    sure = CERTAIN if e.race is Race.HANDLER else LIKELY
    return Finding("a userfaultfd handler resolved it while the thread waited", sure)


RULE = Rule(
    "userfaultfd",
    "resolved by a userfaultfd handler",
    "the latency is the handler's: prefetch the working set, or copy several pages for each fault",
    _holds,
)
