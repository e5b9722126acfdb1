"""Failed faults: nothing was mapped, the rights forbade it, or the file ends before (SIGSEGV, SIGBUS,
EFAULT).
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, allowed
from pagelens.why.evidence import Area, Evidence, Race
from pagelens.why.verdict import CERTAIN, LIKELY

_FILES = (Area.FILE, Area.SHARED_FILE, Area.SHMEM)


def _whose(e: Evidence) -> str:
    return "" if e.user else "; the kernel took it for the program, the call got EFAULT"


def _unmapped(e: Evidence) -> Finding | None:
    if not e.failed or e.area is not Area.UNMAPPED:
        return None
    past = "something was mapped there earlier" if e.was_mapped else "nothing was mapped there before either"
    return Finding(f"no vma held the address: {past}{_whose(e)}")


def _permission(e: Evidence) -> Finding | None:
    if not e.failed or e.area in (Area.UNMAPPED, Area.UNSEEN):
        return None
    if not allowed(e):
        return Finding(f"the vma was there and did not allow the access{_whose(e)}", CERTAIN)
    if e.race is Race.CALL:
        return Finding(f"another thread's call was changing the range at that moment{_whose(e)}", LIKELY)
    return None


def _end_of_file(e: Evidence) -> Finding | None:
    # A call of another thread amid this one leaves both open: it may be the rights.
    if not (e.failed and e.area in _FILES and allowed(e)):
        return None
    return Finding(f"the mapping allowed it, the file has no page there (beyond its end){_whose(e)}", LIKELY)


def _gave_up(e: Evidence) -> Finding | None:
    if not (e.failed and e.area in (Area.ANON, Area.HUGETLB) and allowed(e)) or e.race is Race.CALL:
        return None
    text = (
        "the mapping allowed it, yet the fault did not complete: fatal signal, guard page, or out of memory"
    )
    if e.area is Area.HUGETLB:
        text = "the mapping allowed it, yet no huge page was free (or the file ends before)"
    return Finding(text + _whose(e), LIKELY)


RULE = Rule(
    "invalid-unmapped",
    "access to an unmapped address",
    "a bug, or a probe: see what was mapped there earlier",
    _unmapped,
)
RULE_PERMISSION = Rule(
    "invalid-permission",
    "access that the vma's rights forbid",
    "a bug, or a deliberate trap (garbage collectors, guard pages, write barriers)",
    _permission,
)
RULE_EOF = Rule(
    "invalid-end-of-file", "access beyond the end of a mapped file", "check the file's size", _end_of_file
)
RULE_GAVE_UP = Rule(
    "gave-up", "fault that did not complete", "see the task's signals and exit code", _gave_up
)
