"""Sharing: which other address spaces still mapped a page when somebody wrote it after a fork.

Two relatives share a page if it was not written on the way from their last common ancestor to either of
them, and neither dropped it. Writes are faults, so this is decided by counting faults on one page in a span
of time, for all rows of a pair of address spaces at once. A relative that was about to exit is `UNCLEAR`:
its exit is recorded after its memory went.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Sharers
from pagelens.why.replay import Replayed

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]

FOREVER = 1 << 62
EXIT_SLACK = 2_000_000  # ns between the end of an address space and the event that tells it


def sharers(run: Replayed, rows: I64, last_seen: dict[int, int], when: I64) -> I64:
    """Sharers of each fault in `rows` (indices). last_seen: mm -> ns of its last own event. when: ns of each
    fault, as it stands to forks."""
    writes = _Writes(run)
    faults = run.faults
    out = np.full(len(rows), int(Sharers.GONE), np.int64)
    family = run.family
    relatives = _components(run)
    birth = {mm: family.parent[mm][1] if mm in family.parent else -1 for mm in run.spaces}
    mms = faults.mm[rows]
    for mm in np.unique(mms).tolist():
        mine = np.flatnonzero(mms == mm)
        time = when[mine]
        page = (faults.addr[rows[mine]] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        group = relatives[mm]
        # Of thousands of short-lived children only those that lived at the time of a fault are looked at.
        at_once = (group.birth <= time.max()) & (group.end >= time.min()) & (group.mm != mm)
        for other in group.mm[at_once].tolist():
            end = family.end.get(other, FOREVER)
            alive = (time > birth[other]) & (time <= end)
            pick = np.flatnonzero(alive)
            if not len(pick):
                continue
            shared = _still_shared(run, writes, mm, other, page[pick], time[pick])
            unsure = (time[pick] > end - EXIT_SLACK) & (time[pick] > last_seen.get(other, -1))
            at = mine[pick]
            sure = at[shared & ~unsure]
            maybe = at[shared & unsure]
            out[maybe] = np.where(out[maybe] == Sharers.GONE, int(Sharers.UNCLEAR), out[maybe])
            out[sure] = int(Sharers.LIVE)
    return out


class _Writes:
    # Completed write faults by (mm, page, time), as one sorted integer column for each mm.
    def __init__(self, run: Replayed) -> None:
        self.faults = run.faults
        faults = run.faults
        self.times = np.sort(faults.time)
        self.wrote = ~faults.failed & ((faults.error < 0) | ((faults.error & 2) != 0))
        self._by_mm: dict[int, I64] = {}
        self._spaces = run.spaces
        self._drops: dict[int, I64] = {}

    def drops(self, mm: int) -> I64:
        """int64[n, 3]: start, end, ns of all that took pages away from mm."""
        table = self._drops.get(mm)
        if table is None:
            space = self._spaces.get(mm)
            rows = space.drops if space else []
            table = self._drops[mm] = np.array(rows, np.int64).reshape(-1, 3)
        return table

    def _column(self, mm: int) -> I64:
        column = self._by_mm.get(mm)
        if column is None:
            lo, hi = np.searchsorted(self.faults.mm, [mm, mm + 1])  # faults are sorted by mm
            rows = int(lo) + np.flatnonzero(self.wrote[lo:hi])
            page = (self.faults.addr[rows] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
            rank = np.searchsorted(self.times, self.faults.time[rows])
            column = self._by_mm[mm] = np.sort((page << 27) | rank)
        return column

    def count(self, mm: int, page: I64, after: I64 | int, until: I64 | int) -> I64:
        """Writes by mm on each page with after < time < until."""
        column = self._column(mm)
        lo = np.searchsorted(self.times, after, side="right")
        hi = np.searchsorted(self.times, until, side="left")
        first = np.searchsorted(column, (page << 27) | lo)
        last = np.searchsorted(column, (page << 27) | hi)
        return np.asarray(np.maximum(last - first, 0), dtype=np.int64)


def _still_shared(run: Replayed, writes: _Writes, a: int, b: int, page: I64, time: I64) -> Bool:
    up_a, up_b = _ancestry(run, a), _ancestry(run, b)
    common = next(mm for mm, _ in up_a if any(mm == other for other, _ in up_b))
    clean = np.ones(len(page), bool)
    left: list[I64 | int] = []
    for chain in (up_a, up_b):
        until: I64 | int = time
        for mm, born in chain:
            if mm == common:
                left.append(until)
                break
            clean &= writes.count(mm, page, born, until) == 0
            clean &= ~_dropped(writes, mm, page, born, until)
            until = born
    # In the ancestor: unwritten between the two departures (or since the one departure).
    first, second = np.minimum(left[0], left[1]), np.maximum(left[0], left[1])
    clean &= writes.count(common, page, first, second) == 0
    clean &= ~_dropped(writes, common, page, first, second)
    return clean


def _ancestry(run: Replayed, mm: int) -> list[tuple[int, int]]:
    out = []
    while True:
        parent = run.family.parent.get(mm)
        out.append((mm, parent[1] if parent else -1))
        if parent is None:
            return out
        mm = parent[0]


def _dropped(writes: _Writes, mm: int, page: I64, after: I64 | int, until: I64 | int) -> Bool:
    out = np.zeros(len(page), bool)
    table = writes.drops(mm)
    if not len(table) or not len(page):
        return out
    near = table[(table[:, 2] > np.min(after)) & (table[:, 2] < np.max(until))]
    order = np.argsort(page)
    ordered = page[order]
    lo = np.searchsorted(ordered, near[:, 0] >> PAGE_SHIFT)
    hi = np.searchsorted(ordered, near[:, 1] >> PAGE_SHIFT)
    after, until = np.broadcast_to(after, page.shape), np.broadcast_to(until, page.shape)
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
