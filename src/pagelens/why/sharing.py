"""Sharing: which other address spaces still mapped a page when somebody wrote it after a fork.

Two relatives share a page if it was not written on the way from their last common ancestor to either of
them, and neither dropped it. A page is known by its key (see `space`), as either may have moved it since. Writes are
faults, so this is decided by counting faults on one page in a span of time, for all rows of a pair of address spaces
at once; what a call populated with write faults counts as written. A relative that was about to exit is `UNCLEAR`: its
exit is recorded after its memory went.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.why.evidence import Sharers
from pagelens.why.lives import FORK_LINK, UNSEEN_KEY
from pagelens.why.replay import Replayed

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]

FOREVER = 1 << 62
EXIT_SLACK = 2_000_000  # ns between the end of an address space and the event that tells it


class Kin:
    """Address spaces that fork made of one another, and which pages they have in common."""

    def __init__(self, run: Replayed) -> None:
        self._run = run
        self._writes = _Writes(run)
        self._lines = _Lines(run)
        self._groups = _components(run)

    def relatives(self, mm: int) -> list[int]:
        """All of the family of `mm`, itself too."""
        return [int(number) for number in self._groups[mm].mm.tolist()]

    def untouched(self, mm: int, key: I64, after: I64 | int, until: I64) -> Bool:
        """bool[n]: whether `mm` neither wrote nor dropped its pages between two times (ns)."""
        quiet = self._writes.count(mm, key, after, until) == 0
        return np.asarray(quiet & ~_dropped(self._writes, mm, key, after, until))

    def same_page(self, mm: int, other: int, key: I64, time: I64, at: int) -> tuple[Bool, I64]:
        """(bool[n], int64[n]): whether `other` had at `at` (ns) the very page that `mm` has at `time`, and its key
        there. key: of the pages in `mm`."""
        if mm == other:
            return self.untouched(mm, key, np.minimum(time, at), np.maximum(time, at)), key
        return _still_shared(self._run, self._lines, self._writes, mm, other, key, time, at)

    def sharers(self, rows: I64, last_seen: dict[int, int], when: I64, born: I64) -> I64:
        """Sharers of each fault in `rows` (indices). last_seen: mm -> ns of its last own event. when: ns of each
        fault, as it stands to forks. born: ns at which its page came with a huge one, -1 where it did not."""
        run, writes, lines = self._run, self._writes, self._lines
        faults = run.faults
        out = np.full(len(rows), int(Sharers.GONE), np.int64)
        family = run.family
        birth = {mm: family.parent[mm][1] if mm in family.parent else -1 for mm in run.spaces}
        mms = faults.mm[rows]
        for mm in np.unique(mms).tolist():
            mine = np.flatnonzero(mms == mm)
            time = when[mine]
            key = run.key[rows[mine]]
            group = self._groups[mm]
            # Of thousands of short-lived children only those that lived at the time of a fault are looked at.
            at_once = (group.birth <= time.max()) & (group.end >= time.min()) & (group.mm != mm)
            for other in group.mm[at_once].tolist():
                end = family.end.get(other, FOREVER)
                alive = (time > birth[other]) & (time <= end)
                pick = np.flatnonzero(alive)
                if not len(pick):
                    continue
                shared, _ = _still_shared(
                    run, lines, writes, mm, other, key[pick], time[pick], made=born[mine[pick]]
                )
                unsure = (time[pick] > end - EXIT_SLACK) & (time[pick] > last_seen.get(other, -1))
                at = mine[pick]
                sure = at[shared & ~unsure]
                maybe = at[shared & unsure]
                out[maybe] = np.where(out[maybe] == Sharers.GONE, int(Sharers.UNCLEAR), out[maybe])
                out[sure] = int(Sharers.LIVE)
        return out


class _Writes:
    # Completed write faults by (mm, key, time), as one sorted integer column for each mm.
    def __init__(self, run: Replayed) -> None:
        self.faults = run.faults
        faults = run.faults
        self.times = np.sort(faults.time)
        self.wrote = ~faults.failed & ((faults.error < 0) | ((faults.error & 2) != 0))
        self._by_mm: dict[int, tuple[I64, I64]] = {}
        self._key = run.key
        self._spaces = run.spaces
        self._drops: dict[int, I64] = {}

    def drops(self, mm: int) -> I64:
        """int64[n, 3]: first key, key behind the last, ns of all that took pages away from mm."""
        table = self._drops.get(mm)
        if table is None:
            space = self._spaces.get(mm)
            rows = space.drops if space else []
            table = self._drops[mm] = np.array(rows, np.int64).reshape(-1, 3)
        return table

    def _column(self, mm: int) -> tuple[I64, I64]:
        # (the keys that were written, number among them and rank of the time in one integer)
        found = self._by_mm.get(mm)
        if found is None:
            lo, hi = np.searchsorted(self.faults.mm, [mm, mm + 1])  # faults are sorted by mm
            rows = int(lo) + np.flatnonzero(self.wrote[lo:hi])
            keys, number = np.unique(self._key[rows], return_inverse=True)
            rank = np.searchsorted(self.times, self.faults.time[rows])
            found = self._by_mm[mm] = (keys, np.sort((number << 32) | rank))
        return found

    def count(self, mm: int, key: I64, after: I64 | int, until: I64 | int) -> I64:
        """Writes by mm on each page with after < time < until."""
        keys, column = self._column(mm)
        lo = np.searchsorted(self.times, after, side="right")
        hi = np.searchsorted(self.times, until, side="left")
        number = np.searchsorted(keys, key)
        known = np.isin(key, keys)
        first = np.searchsorted(column, (number << 32) | lo)
        last = np.searchsorted(column, (number << 32) | hi)
        return np.asarray(np.where(known, np.maximum(last - first, 0), 0), dtype=np.int64)


class _Lines:
    # Keys from a child to its parent and back: what fork had given which key.
    def __init__(self, run: Replayed) -> None:
        lives = run.lives
        self._key = np.array(lives.key or [0], np.int64)
        self._parent = np.array(lives.parent or [-1], np.int64)
        self._forked = np.array(lives.link or [0], np.int64) == FORK_LINK
        self._pages = np.diff(self._key, append=lives.end)
        self._mm = np.array(lives.mm or [-1], np.int64)
        self._down: dict[int, tuple[I64, I64, I64]] = {}

    def up(self, key: I64) -> tuple[I64, Bool]:
        """(key in the parent, whether the page came by fork and is still that one)."""
        life = np.searchsorted(self._key, key, side="right") - 1
        known = (life >= 0) & (key < UNSEEN_KEY)
        life = np.where(known, life, 0)
        return self._parent[life] + key - self._key[life], known & self._forked[life]

    def down(self, mm: int, key: I64) -> tuple[I64, Bool]:
        """(key in the child mm at its birth, whether it got the page), of keys in its parent."""
        table = self._down.get(mm)
        if table is None:
            at = np.flatnonzero(self._forked & (self._mm == mm))
            at = at[np.argsort(self._parent[at])]
            table = self._down[mm] = (self._parent[at], self._pages[at], self._key[at])
        start, pages, first = table
        if not len(start):
            return key, np.zeros(len(key), bool)
        at = np.maximum(np.searchsorted(start, key, side="right") - 1, 0)
        return first[at] + key - start[at], (key >= start[at]) & (key < start[at] + pages[at])


def _still_shared(
    run: Replayed,
    lines: _Lines,
    writes: _Writes,
    a: int,
    b: int,
    key: I64,
    time: I64,
    b_time: int | None = None,
    made: I64 | int = -1,
) -> tuple[Bool, I64]:
    # Whether b has (at b_time, else at `time`) what a has at `time` under `key`, and the key in b. made: ns; there was
    # no such page before.
    up_a, up_b = _ancestry(run, a), _ancestry(run, b)
    common = next(mm for mm, _ in up_a if any(mm == other for other, _ in up_b))
    clean = np.ones(len(key), bool)
    until: I64 | int = time

    def unchanged(mm: int, after: I64 | int, before: I64 | int) -> Bool:
        quiet = writes.count(mm, key, after, before) == 0
        return np.asarray(quiet & ~_dropped(writes, mm, key, after, before), dtype=bool)

    for mm, born in up_a:
        if mm == common:
            break
        clean &= unchanged(mm, born, until)
        key, came = lines.up(key)
        clean &= came
        until = born
    below = up_b[: next(i for i, (mm, _) in enumerate(up_b) if mm == common)]
    left: I64 | int = below[-1][1] if below else time if b_time is None else b_time
    # In the ancestor: unwritten between the two departures (or since the one departure).
    clean &= unchanged(common, np.minimum(until, left), np.maximum(until, left))
    clean &= made < np.minimum(until, left)
    ends: list[I64 | int] = [time if b_time is None else b_time]
    ends = (ends + [born for _, born in below])[: len(below)]  # when each was left, or now
    for (mm, born), end in zip(reversed(below), reversed(ends), strict=True):
        key, got = lines.down(mm, key)
        clean &= got & unchanged(mm, born, end)
    return clean, key


def _ancestry(run: Replayed, mm: int) -> list[tuple[int, int]]:
    out = []
    while True:
        parent = run.family.parent.get(mm)
        out.append((mm, parent[1] if parent else -1))
        if parent is None:
            return out
        mm = parent[0]


def _dropped(writes: _Writes, mm: int, key: I64, after: I64 | int, until: I64 | int) -> Bool:
    out = np.zeros(len(key), bool)
    table = writes.drops(mm)
    if not len(table) or not len(key):
        return out
    near = table[(table[:, 2] > np.min(after)) & (table[:, 2] < np.max(until))]
    order = np.argsort(key)
    ordered = key[order]
    lo = np.searchsorted(ordered, near[:, 0])
    hi = np.searchsorted(ordered, near[:, 1])
    after, until = np.broadcast_to(after, key.shape), np.broadcast_to(until, key.shape)
    for i in np.flatnonzero(lo < hi).tolist():
        rows, when = order[lo[i] : hi[i]], near[i, 2]
        out[rows] |= (when > after[rows]) & (when < until[rows])
    return out


@dataclass(frozen=True, slots=True)
class _Group:
    # Address spaces that descend from one; columns.
    mm: I64
    birth: I64
    end: I64


def _components(run: Replayed) -> dict[int, _Group]:
    root: dict[int, int] = {}
    for mm in run.spaces:
        top = mm
        while top in run.family.parent:
            top = run.family.parent[top][0]
        root[mm] = top
    members: dict[int, list[int]] = {}
    for mm, top in root.items():
        members.setdefault(top, []).append(mm)
    family = run.family
    groups = {
        top: _Group(
            np.array(mms, np.int64),
            np.array([family.parent[m][1] if m in family.parent else -1 for m in mms], np.int64),
            np.array([family.end.get(m, FOREVER) for m in mms], np.int64),
        )
        for top, mms in members.items()
    }
    return {mm: groups[top] for mm, top in root.items()}
