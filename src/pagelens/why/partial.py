"""What a memory call that failed has changed all the same.

The kernel works through a range area by area and stops at the first that will not do: what lies before it has been
changed. A hole ends mprotect and the mlock calls; madvise passes over holes and says so at the end; what is locked
ends MADV_DONTNEED. mlock populates only after it has marked the whole range, up to the first area without rights.

Rejected: to take failed calls as without effect (one mapping in twenty of a random program was then wrong).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pagelens.vm.units import page_down, page_up
from pagelens.why.evidence import Area
from pagelens.why.facts import Call
from pagelens.why.lives import State
from pagelens.why.space import Space

_ENOMEM, _EAGAIN, _EFAULT, _EINVAL = -12, -11, -14, -22
_POPULATE = (22, 23)  # MADV_POPULATE_READ, _WRITE
_DISCARDING = (4, 8)  # MADV_DONTNEED, MADV_FREE: not of what is locked, or special


def effect(space: Space, call: Call) -> Call | None:
    """The call that has the effect that the failed one had, or None where it had none.

    Sources: mm/mprotect.c do_mprotect_pkey, mm/madvise.c madvise_walk_vmas and madvise_populate, mm/mlock.c do_mlock.
    """
    if call.name in ("mprotect", "pkey_mprotect") and call.result == _ENOMEM:
        return _until(call, _hole(space, call.args[0], page_up(call.args[0] + call.args[1])))
    if call.name in ("mlock", "mlock2", "munlock") and call.result in (_ENOMEM, _EAGAIN):
        return _lock(space, call)
    if call.name == "madvise":
        return _advice(space, call)
    if (
        call.name == "mremap"
        and call.result == _EFAULT
        and call.args[3] & 2
        and space.index(call.args[0]) >= 0
    ):
        return call  # MREMAP_FIXED: to 6.16 the target is unmapped before the source is found to have a hole
    return None


def _until(call: Call, end: int) -> Call | None:
    start = page_down(call.args[0])
    if end <= start:
        return None
    return replace(call, result=0, args=(start, end - start, *call.args[2:]))


def _lock(space: Space, call: Call) -> Call | None:
    # result: -ENOMEM where nothing is populated, -EFAULT where it is up to what has no rights.
    start, end = page_down(call.args[0]), page_up(call.args[0] + call.args[1])
    hole = _hole(space, start, end)
    if hole < end:
        marked = _until(call, hole)
        return marked and replace(marked, result=_ENOMEM)
    if call.name == "munlock" or populated_until(space, start, end) >= end:
        return None  # the limit: found before anything is done
    return replace(call, result=_EFAULT)


def _advice(space: Space, call: Call) -> Call | None:
    start, end, advice = call.args[0], page_up(call.args[0] + call.args[1]), call.args[2]
    if advice in _POPULATE:
        if call.result not in (_ENOMEM, _EFAULT, _EINVAL):
            return None
        until = min(_hole(space, start, end), populated_until(space, start, end))
        if advice == _POPULATE[1]:  # writes
            until = min(until, _first(space, start, end, lambda s: not s.prot & 2))
        return _until(call, until)
    if call.result == _ENOMEM:
        return replace(call, result=0)  # holes are passed over
    if call.result == _EINVAL and advice in _DISCARDING and start == page_down(start):
        refused = _first(
            space,
            start,
            end,
            lambda s: bool(s.locked) or s.area is Area.SPECIAL or (advice == 8 and s.area is not Area.ANON),
        )
        return _until(call, refused) if refused < end else None
    return None


def populated_until(space: Space, start: int, end: int) -> int:
    """Where populating [start, end) failed: at what nobody may access, else (behind the end of its file) at what a file
    backs; end where there is neither."""
    refused = _first(space, start, end, lambda s: not s.prot)
    if refused < end:
        return refused
    return _first(space, start, end, lambda s: s.area in (Area.FILE, Area.SHARED_FILE))


def _hole(space: Space, start: int, end: int) -> int:
    """The first address in [start, end) that is not mapped, or end."""
    at = start
    while at < end:
        i = space.index(at)
        if i < 0:
            return at
        at = space.segs[i].end
    return end


def _first(space: Space, start: int, end: int, which: Callable[[State], bool]) -> int:
    """The first address in [start, end) whose state is such, or end."""
    i = max(space.index(start), 0)
    for seg in space.segs[i:]:
        if seg.start >= end:
            break
        if seg.end > start and which(space.lives.states[seg.state]):
            return max(seg.start, start)
    return end
