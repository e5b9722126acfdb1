"""What had taken a page of a file or of shared memory away: all answers that the recording admits.

`history` knows of pages by their faults. A page that only a neighbour's read had mapped has none, and whether it was
mapped depends on what the page cache held then (`cache`) and where its vma ended (`windows`); MADV_PAGEOUT passes over
pages that others map. So each such page is followed from its beginning on, with all that it may be at a time: never
mapped, mapped, a copy, or gone and by what. What takes pages takes those that are mapped; what may map or take leaves
both. What is left at the fault are the candidates, one of them most often.

Rejected: to take the last read around it as having mapped the page (wrong for one in fifty of them).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.cache import Cache
from pagelens.why.evidence import Area, Gone, Mark, Origin, Prior
from pagelens.why.facts import Facts
from pagelens.why.history import SNAP_ANON, History, snapshot_rows
from pagelens.why.lives import DROP_LINK, FORK_LINK
from pagelens.why.nearby import Around, last_drops, origins
from pagelens.why.replay import Replayed, state_column
from pagelens.why.windows import AROUND

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]
_LONGEST = 256  # lives of a page that are followed back
# What happened to a page, in order.
_MAP, _COPY, _FILL, _NEAR, _PERHAPS, _DONTNEED, _CUT, _HOLE, _PAGEOUT, _COLD, _LEFT, _DOUBT = range(12)
# What a page may be, beside what Gone says.
_MAPPED, _OWN, _COOL = 16, 32, 64
_HELD = _MAPPED | _OWN | _COOL


@dataclass(frozen=True, slots=True)
class Taken:
    """Columns beside the faults. gone: Gone, 0 where `history` and the advice say all. again: it was mapped all the
    time, and the kernel had unmapped it. near: that it was mapped rests on a neighbour's fault."""

    gone: I64
    again: Bool
    near: Bool


def taken_away(
    facts: Facts, run: Replayed, past: History, area: I64, prior: I64, present: Bool, mark_time: I64
) -> Taken:
    """For every fault. area, prior, present, mark_time: columns."""
    n = len(prior)
    gone, again, near = np.zeros(n, np.int8), np.zeros(n, bool), np.zeros(n, bool)
    absent = ~present & ~run.faults.failed & np.isin(area, AROUND) & (past.life >= 0)
    rows = np.flatnonzero(absent & (prior != Prior.ANON) & (prior != Prior.SWAPPED))
    hole = state_column(run.lives, run.state[rows], "hole_time", -1)
    drops = last_drops(run.lives)[past.life[rows]]
    since = np.maximum(drops, past.touch[rows])
    could = (hole > since) | (mark_time[rows] > since) | ((drops >= 0) & (prior[rows] == Prior.NONE))
    rows = rows[could]
    if len(rows):
        stories = _Stories(facts, run, past)
        for row in rows.tolist():
            left, by_neighbour = stories.ends(row)
            near[row] = by_neighbour
            gone[row] = left & ~_HELD
            again[row] = left in (_MAPPED, _COOL)
    return Taken(gone, again, near)


class _Stories:
    def __init__(self, facts: Facts, run: Replayed, past: History) -> None:
        self._run, self._past = run, past
        self._cache = Cache(facts, run)
        self._around = Around(run, past.life)
        area = state_column(run.lives, run.state, "area", int(Area.UNMAPPED))
        rows = np.flatnonzero(np.isin(area, AROUND) & ~run.faults.failed & (past.life >= 0))
        write = (run.faults.error[rows] < 0) | ((run.faults.error[rows] & 2) != 0)
        copy = write & (area[rows] == Area.FILE)
        key, time, code = run.key[rows], run.faults.time[rows], np.where(copy, _COPY, _MAP)
        for _, when, keys, kinds in snapshot_rows(facts, run):
            key, time = np.append(key, keys), np.append(time, np.full(len(keys), when))
            code = np.append(code, np.where(kinds == SNAP_ANON, _COPY, _MAP))
        order = np.lexsort((time, key))
        self._key, self._time, self._code = key[order], time[order], code[order]
        self._spans: dict[int, I64] = {}

    def ends(self, row: int) -> tuple[int, bool]:
        """(what the page of a fault may be just before it, whether a neighbour's fault decides it)."""
        events, start = self._events(row)
        left = _follow(events, start)
        near = left != _follow([event for event in events if event[1] not in (_NEAR, _PERHAPS)], start)
        if near and not left & ~_HELD:
            # That the kernel unmapped a page is rarer than that a read passed over it.
            left = _follow([(t, _PERHAPS if c == _NEAR else c) for t, c in events], start)
        if left & ~_HELD:
            left &= ~_HELD
        return left, near

    def _events(self, row: int) -> tuple[list[tuple[int, int]], int]:
        # In order of time, and what the page was before them.
        run, lives, faults = self._run, self._run.lives, self._run.faults
        state = lives.states[run.state[row]]
        page = (int(faults.addr[row]) + state.shift) >> PAGE_SHIFT
        until = int(faults.time[row]) - max(int(faults.latency[row]), 0)
        life, key = int(self._past.life[row]), int(run.key[row])
        root = -1
        out: list[tuple[int, int]] = []
        for _ in range(_LONGEST):
            own = self._own(lives.mm[life], key, lives.time[life], until)
            out += own
            for when, sure in self._around.of(key):
                if when < until:
                    held = self._cache.held(state.file, page, when) if state.file else None
                    if held is not False:
                        out.append((when, _NEAR if held and sure else _PERHAPS))
            if any(code in (_MAP, _COPY) for _, code in own):
                break  # whatever was before
            link, begun = lives.link[life], lives.time[life]
            if link == FORK_LINK:
                if state.area is not Area.FILE:
                    break
                root = root if root >= 0 else int(origins(lives, np.array([key]))[0][0])
                if not self._past.copied.to(lives.mm[life], root):
                    unsure = self._past.copied.unsure(np.array([key]), np.array([life]))
                    out.append((begun, _DOUBT if unsure.all() else _LEFT))
            elif link == DROP_LINK:
                out.append((begun, _CUT if lives.origin[life] == Origin.CUT else _DONTNEED))
            else:
                break
            until = min(until, begun)
            key += lives.parent[life] - lives.key[life]
            life = bisect.bisect_right(lives.key, key) - 1
        else:
            return sorted(out), Gone.FRESH | _MAPPED
        return sorted(out), int(Gone.FRESH)

    def _own(self, mm: int, key: int, after: int, until: int) -> list[tuple[int, int]]:
        # What is known of the page itself in one of its lives.
        low, high = np.searchsorted(self._key, [key, key + 1])
        out = list(zip(self._time[low:high].tolist(), self._code[low:high].tolist(), strict=True))
        spans = self._of(mm)
        hit = spans[(spans[:, 0] <= key) & (key < spans[:, 1])]
        out += [(when, code) for _, _, when, code in hit.tolist()]
        return [(when, code) for when, code in out if after <= when < until]

    def _of(self, mm: int) -> I64:
        if mm not in self._spans:
            space = self._run.spaces.get(mm)
            rows: list[tuple[int, int, int, int]] = []
            if space is not None:
                owned = set(space.owned)
                rows += [(*f, _COPY if f in owned else _FILL) for f in space.filled]
                rows += [(*h, _HOLE) for h in space.holes]
                rows += [
                    (a, b, when, _PAGEOUT if mark is Mark.PAGEOUT else _COLD)
                    for a, b, when, mark in space.advised
                ]
            self._spans[mm] = np.array(rows, np.int64).reshape(-1, 4)
        return self._spans[mm]


def _follow(events: list[tuple[int, int]], start: int) -> int:
    # All that a page may be after `events`.
    now = start
    for _, code in events:
        if code in (_MAP, _COPY):
            now = _MAPPED if code == _MAP else _OWN
        elif code in (_FILL, _NEAR):
            now = (now & _OWN) | (_MAPPED if now & ~_OWN else 0)
        elif code == _PERHAPS:
            now |= _MAPPED if now & ~_OWN else 0
        elif code in (_DONTNEED, _CUT):
            by = Gone.DONTNEED if code == _DONTNEED else Gone.CUT
            now = (now & ~_HELD) | (by if now & _HELD else 0)
        elif code == _HOLE and now & (_MAPPED | _COOL):
            now = (now & ~(_MAPPED | _COOL)) | Gone.CUT
        elif code == _PAGEOUT and now & (_MAPPED | _COOL):
            now |= Gone.PAGEOUT
        elif code == _COLD and now & _MAPPED:
            now = (now & ~_MAPPED) | _COOL
        elif code == _DOUBT and now & _HELD:
            now |= Gone.FRESH
        elif code == _LEFT and now & _HELD:  # fork copied no entries of this mapping
            now = (now & ~_HELD) | Gone.FRESH
    return int(now)
