"""Write to a page whose sharers are gone: after the child's exit the parent's page is still write-protected.

The kernel reuses it if nobody holds a reference (wp_can_reuse_anon_folio), and copies otherwise: 2 of 12,800
were copied when measured. The fault does not tell which; two snapshots with frame numbers do.
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary, private
from pagelens.why.evidence import Evidence, Forked, Huge, Outcome, Prior, Sharers
from pagelens.why.verdict import AMBIGUOUS, CERTAIN, LIKELY


def _holds(e: Evidence) -> Finding | None:
    own = e.prior in (Prior.ANON, Prior.POPULATED) or (
        e.prior is Prior.NONE and not e.dropped and e.huge is not Huge.READ
    )
    if not (ordinary(e) and private(e) and e.write and e.present and own and e.forked is not Forked.NONE):
        return None
    if e.prior is not Prior.ANON and e.area.name == "FILE":
        return None
    gone = e.sharers is Sharers.GONE
    if e.outcome is Outcome.REUSED:
        return Finding(
            "a fork had write-protected the page; nobody shared it any more, and it was reused", CERTAIN
        )
    if gone and e.outcome is Outcome.COPIED:
        return Finding("nobody shared the page any more, yet a reference was held: it was copied", LIKELY)
    if gone:
        return Finding("nobody maps the page any more: reused, or copied if a reference was held", AMBIGUOUS)
    if e.sharers in (Sharers.UNCLEAR, Sharers.UNSEEN) and e.outcome is Outcome.UNDECIDED:
        return Finding("whether another process still mapped the page cannot be told", AMBIGUOUS)
    return None


RULE = Rule(
    "sharers-gone",
    "write to a page whose sharers are gone (reused or copied)",
    "one cheap fault a page after each fork; fork from a small process (forkserver, posix_spawn, "
    "vfork) to avoid it",
    _holds,
)
