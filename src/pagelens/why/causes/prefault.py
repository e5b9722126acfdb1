"""Prefault: mlock, MAP_POPULATE and MADV_POPULATE_* make pages present in one call. They raise min_flt, but
the kernel reports no fault event for them (mm_account_fault returns without registers), so the count belongs
to the call, measured across it. Other calls reach pages the same way (get_user_pages): that is
`kernel-access`."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule
from pagelens.why.evidence import Evidence

CALLS = frozenset({"mmap", "mlock", "mlock2", "mlockall", "madvise", "process_madvise", "brk", "mremap"})


def of_call(name: str) -> str:
    """The cause of faults that a call took by get_user_pages.

    >>> of_call("mlock"), of_call("futex")
    ('prefault', 'kernel-access')
    """
    return "prefault" if name in CALLS or name == "mprotect" else "kernel-access"


def _never(_e: Evidence) -> Finding | None:
    return None  # it is a cause of calls, not of fault events: of_call()


RULE = Rule(
    "prefault",
    "prefaulted by a call (mlock, MAP_POPULATE, madvise)",
    "this is the remedy for other faults; where it costs too much, populate less or lock on fault "
    "(MLOCK_ONFAULT)",
    _never,
)
