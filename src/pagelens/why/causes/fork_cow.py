"""Copy-on-write after fork: fork write-protects what it shares; who writes first, gets a copy (do_wp_page).

Parent and child are two causes, because their remedies differ.
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary, private
from pagelens.why.evidence import Evidence, Forked, Huge, Outcome, Prior, Sharers
from pagelens.why.verdict import CERTAIN, LIKELY


def _on(e: Evidence, side: Forked) -> bool:
    # A fork before the recording: which side this is, nobody knows.
    return e.forked is side or (e.forked is not Forked.NONE and e.sharers is Sharers.UNSEEN)


def _shared_write(e: Evidence, side: Forked) -> Finding | None:
    own = e.prior in (Prior.ANON, Prior.POPULATED) or (
        e.prior is Prior.NONE and not e.dropped and e.huge is not Huge.READ
    )
    if not (ordinary(e) and private(e) and e.write and e.present and own and _on(e, side)):
        return None
    if e.prior is not Prior.ANON and e.area.name == "FILE":
        return None  # a file page that fork shared is still a file page: file_cow
    if e.sharers is Sharers.GONE or e.outcome is Outcome.REUSED:
        return None
    sure = CERTAIN if e.sharers is Sharers.LIVE and e.prior is Prior.ANON else LIKELY
    return Finding(
        "write to a present read-only page that a fork had shared and another process still maps", sure
    )


RULE = Rule(
    "fork-cow-parent",
    "copy-on-write after fork, in the parent",
    "fork earlier or from a small process (forkserver, posix_spawn), MADV_DONTFORK for what "
    "children do not need, "
    "write less while children live",
    lambda e: _shared_write(e, Forked.PARENT),
)
RULE_CHILD = Rule(
    "fork-cow-child",
    "copy-on-write after fork, in the child",
    "do not write to inherited data: for Python, gc.freeze() before fork stops the collector's "
    "writes, but not "
    "reference counts; arrays, shared memory or mmap have none",
    lambda e: _shared_write(e, Forked.CHILD),
)
