"""Features: from the replay's columns to one packed `Evidence` a fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.why.before import shared_before
from pagelens.why.evidence import (
    Area,
    Cut,
    Forked,
    Gone,
    Guarded,
    Mark,
    Outcome,
    Prior,
    Race,
    Sharers,
    pack,
)
from pagelens.why.facts import Call, Facts
from pagelens.why.freed import perhaps_zero, zeroed_by_read
from pagelens.why.history import History
from pagelens.why.hugepages import dropped_in_block, huge_pages
from pagelens.why.outcome import outcomes
from pagelens.why.renumber import in_execve
from pagelens.why.replay import GREW, IN_FLIGHT, WAS_MAPPED, Replayed, state_column
from pagelens.why.sharing import Kin
from pagelens.why.taken import taken_away
from pagelens.why.userfaults import brought_by_copy, handled

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]

PF_PK = 0x20  # error code: a protection key forbade it
EXIT_WORK = 100_000  # ns of CPU that an exit needs at most, as a rule
NEARBY = 100_000  # ns: a fault that takes longer has slept
# ns: the CPU finds an entry absent some time before the handler's first event, a stolen virtual CPU much before it.
LATE = 1_000_000


def features(facts: Facts, run: Replayed, past: History, inferred: Bool) -> I64:
    """int64[n]: the packed evidence of each fault of `run.faults`."""
    faults = run.faults
    n = len(faults)
    known = faults.error >= 0
    blind = ~known  # inferred ones are not
    error = np.where(known, faults.error, 0)
    known &= ~inferred
    present, write, fetch = (error & 1) != 0, (error & 2) != 0, (error & 16) != 0
    area = state_column(run.lives, run.state, "area", int(Area.UNMAPPED))
    prot = state_column(run.lives, run.state, "prot", 0)
    prot = np.where(state_column(run.lives, run.state, "guard", 0) != 0, 0, prot)
    prot = np.where((error & PF_PK) != 0, prot & ~3, prot)  # a protection key took the rights away
    prior = past.prior.copy()
    race = np.full(n, int(Race.NONE), np.int8)
    again = np.flatnonzero(past.before >= 0)
    begun = _begun(run, again)
    _thread_race(run, past, race, again, begun, write)
    # A read of another thread came first: the page was there when this write was looked at.
    raced_read = (race[again] == Race.NONE) & write[again] & ~present[again]
    late = _late(run, past, again, begun)
    raced_read &= ((past.touch[again] > begun) | late) & (prior[again] == Prior.ZERO)
    present[again[raced_read]] = True
    _call_race(facts, run, past, race)
    _perhaps_race(run, past, race)
    late &= (race[again] == Race.NONE) & ~present[again] & (write[past.before[again]] | ~write[again])
    race[again[late]] = int(Race.LATE)
    guarded = _guarded(run, past, present & write & ~faults.failed)
    zeroed_by_read(run, past, prior, guarded, present & write & ~faults.failed)
    uffd, copied = handled(facts, run, race, present, guarded)
    brought_by_copy(run, past, prior, copied)

    # fork leaves out the entries of areas that nobody has written to (vma_needs_copy): the child maps them for itself.
    uncopied = past.inherited & (past.before < 0) & ~present & ~blind
    prior[uncopied & np.isin(prior, [Prior.FILE, Prior.SHARED, Prior.ZERO, Prior.POPULATED])] = int(
        Prior.NONE
    )
    private = (area == Area.ANON) | (area == Area.FILE)
    uncalled = not facts.settings.get("calls", True)
    shares = (present & write) | (blind & (uncalled | (prior != Prior.NONE)))
    huge, came, blocks = huge_pages(facts, run, past, prior, present, write)
    forked, share, outcome = _forks(facts, run, past, private & shares & ~faults.failed, prior, came)
    zeroed = perhaps_zero(run, past, prior, forked, present & write & ~faults.failed)
    mark_time = state_column(run.lives, run.state, "mark_time", -1)
    mark = state_column(run.lives, run.state, "mark", 0)
    # A page that came back read-only is so on account of what had taken it away before.
    since = past.touch
    back = np.flatnonzero((guarded == Guarded.BACK) | (guarded == Guarded.BACK_DISK))
    if len(back):
        since = since.copy()
        since[back] = past.own[past.before[back]]
    taken = taken_away(facts, run, past, area, prior, present, mark_time)
    dropped = (
        (past.dropped | dropped_in_block(run, past, blocks, prior, present))
        & (taken.gone == 0)
        & ~taken.again
    )
    open_ = past.perhaps & ~present & ~faults.failed & (area == Area.ANON) & (prior == Prior.NONE) & ~dropped
    taken.gone[open_] = int(Gone.FRESH | Gone.DONTNEED)
    prior[taken.gone != 0] = int(Prior.NONE)
    prior[taken.again] = np.where(area[taken.again] == Area.SHMEM, int(Prior.SHARED), int(Prior.FILE))
    if mark.any():
        known_page = prior != Prior.NONE
        mark = np.where((mark_time > since) & known_page, mark, int(Mark.NONE))
        # MADV_FREE once more, of what MADV_PAGEOUT had taken already.
        gone_before = (mark == Mark.FREE) & (state_column(run.lives, run.state, "freed_out", -1) > since)
        mark = np.where(gone_before, int(Mark.PAGEOUT), mark)
    columns: dict[str, npt.NDArray[np.generic] | int] = {
        "known": known,
        "present": present,
        "write": write,
        "exec": fetch,
        "user": faults.user,
        "in_call": faults.call >= 0,
        "failed": faults.failed,
        "major": faults.major,
        "area": area,
        "readable": (prot & 1) != 0,
        "writable": (prot & 2) != 0,
        "executable": (prot & 4) != 0,
        "grew": (run.flags & GREW) != 0,
        "prior": prior,
        "origin": past.origin,
        "dropped": dropped,
        "paged": past.paged & dropped,
        "gone": taken.gone,
        "near": taken.near,
        "mark": mark,
        "forked": forked,
        "sharers": share,
        "outcome": outcome,
        "race": race,
        "huge": huge,
        "guarded": guarded,
        "uffd": uffd,
        "numa": bool(facts.settings.get("numa_balancing")),
        "rearmed": state_column(run.lives, run.state, "prot_time", -1) > past.touch,
        "flushed": state_column(run.lives, run.state, "sync_time", -1) > past.touch,
        "was_mapped": (run.flags & WAS_MAPPED) != 0,
        "zeroed": zeroed,
        "inferred": inferred,
        "unsure": past.unsure & blind,
        "uncalled": uncalled,
        "by_exec": in_execve(faults) & ~faults.user,
        "cut": _cut(facts, past),
    }
    return pack(columns) if n else np.empty(0, np.int64)


def _begun(run: Replayed, rows: I64) -> I64:
    # ns at which faults were entered.
    faults = run.faults
    return np.asarray(faults.time[rows] - np.maximum(faults.latency[rows], 0))


def _cut(facts: Facts, past: History) -> I64 | int:
    if facts.dropped_before < 0:
        return int(Cut.NONE)
    older = past.times[past.life] < facts.dropped_before
    blind = past.touch < facts.dropped_before
    return np.where(older, np.where(blind, int(Cut.HISTORY), int(Cut.MAPPING)), int(Cut.NONE))


def _thread_race(run: Replayed, past: History, race: I64, rows: I64, begun: I64, write: Bool) -> None:
    # rows: faults on pages that have faulted before, begun: when they were entered.
    faults = run.faults
    prev = past.before[rows]
    hit = ~faults.failed[rows] & (faults.latency[rows] > 0) & _another_threads(run, prev, rows)
    hit &= (faults.time[prev] > begun) & (write[prev] | ~write[rows])
    race[rows[hit]] = int(Race.THREAD)


def _late(run: Replayed, past: History, rows: I64, begun: I64) -> Bool:
    # Another thread's fault on the page had completed when the handler of this one began, but perhaps not when the CPU
    # looked the page up.
    faults = run.faults
    prev = past.before[rows]
    ahead = begun - faults.time[prev]
    late = ~faults.failed[rows] & (faults.latency[rows] > 0) & (ahead >= 0) & (ahead < LATE)
    return np.asarray(late & _another_threads(run, prev, rows))


def _another_threads(run: Replayed, prev: I64, rows: I64) -> Bool:
    # Whether the faults `prev` are of another thread of the same address space as `rows`.
    faults = run.faults
    return np.asarray((faults.tid[prev] != faults.tid[rows]) & (faults.mm[prev] == faults.mm[rows]))


def _perhaps_race(run: Replayed, past: History, race: I64) -> None:
    # Without latencies it cannot be told whether another thread's fault just before this one came in between.
    faults = run.faults
    rows = np.flatnonzero((past.before >= 0) & (faults.latency < 0) & ~faults.failed & (race == Race.NONE))
    prev = past.before[rows]
    close = _another_threads(run, prev, rows) & (faults.time[rows] - faults.time[prev] < NEARBY)
    race[rows[close]] = int(Race.MAYBE)


def _overlaps(run: Replayed, call: Call) -> I64:
    # Faults of the call's address space, by other threads, under way while the call was.
    faults = run.faults
    lo, hi = np.searchsorted(faults.mm, [call.mm, call.mm + 1])
    # A fault that takes over a second to complete is found by its end only if it ends within 10 s of the
    # call.
    a = lo + int(np.searchsorted(faults.time[lo:hi], call.start))
    b = lo + int(np.searchsorted(faults.time[lo:hi], call.end + 10_000_000_000))
    rows = np.arange(a, b)
    return np.asarray(rows[(_begun(run, rows) <= call.end) & (faults.tid[rows] != call.tid)])


def _call_race(facts: Facts, run: Replayed, past: History, race: I64) -> None:
    faults = run.faults
    race[((run.flags & IN_FLIGHT) != 0) & (race == Race.NONE)] = int(Race.CALL)
    odd = np.flatnonzero(faults.failed & (race == Race.NONE))
    if not len(odd) or len(odd) > 200_000:
        return
    for call in facts.calls:
        if call.name not in ("mprotect", "pkey_mprotect", "munmap", "mmap", "mremap", "madvise"):
            continue
        rows = np.intersect1d(_overlaps(run, call), odd, assume_unique=True) if len(odd) else odd
        if call.name == "munmap":  # what was mapped since was not its business
            rows = rows[past.begun(rows) < call.start]
        if len(rows):
            start = call.result if call.name == "mmap" else call.args[0]
            addr = faults.addr[rows].astype(np.int64)
            race[rows[(addr >= start) & (addr < start + call.args[1])]] = int(Race.CALL)


def _guarded(run: Replayed, past: History, rewrites: Bool) -> I64:
    # Who write-protected a page since its last write. rewrites: completed writes to present pages.
    out = np.full(len(rewrites), int(Guarded.NONE), np.int8)
    own = past.own
    faults = run.faults
    if not rewrites.any():
        return out
    back = np.flatnonzero(rewrites & (past.before >= 0))
    back = back[(own[past.before[back]] >= 0) & (faults.error[past.before[back]] >= 0)]
    error, major = faults.error[past.before[back]], faults.major[past.before[back]]
    back = back[((error & 1) == 0) & ~(major & ((error & 2) != 0))]  # written pages that were absent once
    out[back] = np.where(faults.major[past.before[back]], int(Guarded.BACK_DISK), int(Guarded.BACK))
    out[rewrites & (state_column(run.lives, run.state, "mergeable", 0) != 0)] = int(Guarded.KSM)
    out[rewrites & (state_column(run.lives, run.state, "clear_time", -1) > own)] = int(Guarded.CLEARED)
    out[rewrites & (state_column(run.lives, run.state, "wp_time", -1) > own)] = int(Guarded.UFFD)
    return out


def _forks(
    facts: Facts, run: Replayed, past: History, wanted: Bool, prior: I64, came: I64
) -> tuple[I64, I64, I64]:
    faults = run.faults
    n = len(faults)
    forked = np.full(n, int(Forked.NONE), np.int8)
    share = np.full(n, int(Sharers.NA), np.int8)
    outcome = np.full(n, int(Outcome.UNDECIDED), np.int8)
    rows = np.flatnonzero(wanted)
    rows = rows[np.isin(prior[rows], [Prior.ANON, Prior.POPULATED, Prior.NONE])]
    child = rows[past.inherited[rows] & (past.own[rows] < 0)]
    forked[child] = int(Forked.CHILD)
    if not len(rows):
        return forked, share, outcome
    time = np.asarray(faults.time).astype(np.int64)
    begins = _fork_calls(facts)
    for mm, times in run.family.forks.items():
        mine = rows[(faults.mm[rows] == mm) & (forked[rows] == Forked.NONE)]
        when = np.array(sorted(times), np.int64)
        time[mine] = _after_fork(when, begins.get(mm, {}), faults.time[mine])
        since = np.maximum(past.own[mine], past.begun(mine))
        later = np.searchsorted(when, time[mine]) > np.searchsorted(when, since)
        forked[mine[later]] = int(Forked.PARENT)
    old = _forked_before(facts, run, past, rows, forked, prior)
    both = np.flatnonzero(forked)
    forked[old] = int(Forked.PARENT)
    share[old] = int(Sharers.UNSEEN)
    if len(both) or len(old):
        kin = Kin(run)
        share[both] = kin.sharers(both, _last_seen(facts, run), time[both], came[both])
        _before(facts, run, past, kin, forked, share, time)
        decided = np.flatnonzero((forked != Forked.NONE) & (faults.new >= 0))
        outcome[decided] = np.where(faults.new[decided] > 0, int(Outcome.COPIED), int(Outcome.REUSED))
        open_ = np.flatnonzero((forked != Forked.NONE) & (share != Sharers.LIVE) & (faults.new < 0))
        outcome[open_] = outcomes(facts, run, kin, open_, time[open_])
    return forked, share, outcome


def _before(facts: Facts, run: Replayed, past: History, kin: Kin, forked: I64, share: I64, time: I64) -> None:
    # Sharers by forks before the recording, of pages that were not written since the first snapshot.
    older = facts.settings.get("older")
    starts = (
        {mm: facts.first[mm].known_ns for mm in older if mm in facts.first}
        if isinstance(older, frozenset)
        else {}
    )
    if not starts:
        return
    since = np.full(int(run.faults.mm.max(initial=0)) + 1, -1, np.int64)
    for mm, when in starts.items():
        since[mm : mm + 1] = when
    rows = np.flatnonzero((forked != Forked.NONE) & (share != Sharers.LIVE))
    rows = rows[past.own[rows] <= since[run.faults.mm[rows]]]
    role, shared = shared_before(facts, run, kin, rows, time[rows])
    unseen = share[rows] == Sharers.UNSEEN
    # A recorded fork's answer stands, unless an older sharer is still there.
    use = (shared != Sharers.NA) & (unseen | (shared == Sharers.LIVE))
    forked[rows[use]], share[rows[use]] = role[use], shared[use]


def _fork_calls(facts: Facts) -> dict[int, dict[int, int]]:
    # mm -> {ns of the fork event: ns at which its call began}.
    calls: dict[int, list[Call]] = {}
    for call in facts.calls:
        if call.name in ("fork", "vfork", "clone", "clone3"):
            calls.setdefault(call.tid, []).append(call)
    out: dict[int, dict[int, int]] = {}
    for task in facts.tasks:
        if task.name == "fork":
            for call in calls.get(task.tid, ()):
                if call.start <= task.time <= call.end:
                    out.setdefault(task.mm, {})[task.time] = call.start
    return out


def _after_fork(when: I64, begins: dict[int, int], time: I64) -> I64:
    # dup_mmap is over some microseconds before the event that tells the fork. A write to a present page of one's own
    # within the call came after it: before, nothing had protected the page, and during it faults wait.
    at = np.searchsorted(when, time)
    following = when[np.minimum(at, len(when) - 1)]
    begun = np.array([begins.get(int(w), 1 << 62) for w in when], np.int64)[np.minimum(at, len(when) - 1)]
    return np.where((at < len(when)) & (time >= begun), following + 1, time)


def _forked_before(facts: Facts, run: Replayed, past: History, rows: I64, forked: I64, prior: I64) -> I64:
    # attach: a page that an older address space had at the start, written for the first time since, and
    # present: some fork that nobody recorded had write-protected it.
    older = facts.settings.get("older") or frozenset()
    assert isinstance(older, frozenset)
    out: list[I64] = []
    for mm in older:
        snapshot = facts.first.get(mm)
        since = snapshot.known_ns if snapshot else -1
        mine = rows[
            (run.faults.mm[rows] == mm) & (forked[rows] == Forked.NONE) & (prior[rows] != Prior.POPULATED)
        ]
        out.append(mine[past.own[mine] <= since])
    return np.concatenate(out) if out else np.empty(0, np.int64)


def _last_seen(facts: Facts, run: Replayed) -> dict[int, int]:
    # The last moment at which each address space was surely in use: its own faults and calls, and the last
    # time that a task of it got a CPU well before its exit (the exit itself takes some 10 to 50 µs of CPU).
    out: dict[int, int] = {}
    faults = run.faults
    if len(faults):
        edges = [*np.flatnonzero(np.diff(faults.mm)).tolist(), len(faults) - 1]
        out = {int(faults.mm[i]): int(faults.time[i]) for i in edges}
    for call in facts.calls:
        out[call.mm] = max(out.get(call.mm, -1), call.start)
    mm, time = facts.ran[:, 0], facts.ran[:, 1]
    ends = np.full(int(mm.max(initial=0)) + 1, 1 << 62, np.int64)
    for space, end in run.family.end.items():
        if space < len(ends):
            ends[space] = end - EXIT_WORK
    early = time < ends[mm]
    latest = np.full(len(ends), -1, np.int64)
    np.maximum.at(latest, mm[early], time[early])
    for space in np.flatnonzero(latest >= 0).tolist():
        out[space] = max(out.get(space, -1), int(latest[space]))
    return out
