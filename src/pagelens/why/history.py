"""History: what is known of each faulting page before its fault, by sorting faults by the page's key.

Rows are the completed faults and, as if they were faults, the pages of the first snapshots. Everything here
is columns; the only loops run over links between lives (fork of fork of …), which are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageState
from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Area, Origin, Prior
from pagelens.why.facts import Facts
from pagelens.why.replay import Replayed, state_column
from pagelens.why.space import DROP_LINK, FORK_LINK, UNSEEN_KEY

I64 = npt.NDArray[np.signedinteger[Any]]
Bool = npt.NDArray[np.bool_]

# Kinds of rows.
READ, WRITE, SNAP_FILE, SNAP_ANON, SNAP_ZERO, SNAP_SWAP = range(6)


@dataclass(frozen=True, slots=True)
class History:
    """Columns beside the faults of `Replayed` (int64[n] where not said).

    prior: Prior. before: row of the fault before this one on the page (-1 none), touch: ns of the last row
    in this life (-1), own: ns of the last write in this life (-1). inherited, dropped: bool, by links.
    origin: Origin. life: index into Lives (-1 none). begun: ns at which the life began.
    """

    prior: I64
    before: I64
    touch: I64
    own: I64
    inherited: Bool
    dropped: Bool
    origin: I64
    life: I64
    begun: I64


def trace(facts: Facts, run: Replayed) -> History:
    """The history of every fault."""
    faults = run.faults
    n = len(faults)
    area = state_column(run.lives, run.state, "area", int(Area.UNMAPPED))
    write = (faults.error < 0) | ((faults.error & 2) != 0)
    done = np.flatnonzero(~faults.failed & (run.key >= 0))
    snap_key, snap_time, snap_kind = _snapshot_rows(facts, run)
    rows_key = np.concatenate((run.key[done], snap_key))
    rows_time = np.concatenate((faults.time[done], snap_time))
    rows_kind = np.concatenate((np.where(write[done], WRITE, READ), snap_kind)).astype(np.int8)
    rows_fault = np.concatenate((done, np.full(len(snap_key), -1, np.int64))).astype(np.int32)
    order = np.lexsort((rows_fault, rows_time, rows_key)).astype(np.int32)
    key, time, kind, fault = rows_key[order], rows_time[order], rows_kind[order], rows_fault[order]
    del rows_key, rows_time, rows_kind, rows_fault, order, done, write  # memory: a million rows each
    index = np.arange(len(key), dtype=np.int32)
    new = np.ones(len(key), bool)
    new[1:] = key[1:] != key[:-1]
    group = np.maximum.accumulate(np.where(new, index, 0)) if len(key) else index
    owned = (kind == WRITE) | (kind == SNAP_ANON) | (kind == SNAP_SWAP)
    last_own = np.maximum.accumulate(np.where(owned, index, -1)) if len(key) else index

    # In the same life: the row just before.
    prior = np.full(n, int(Prior.NONE), np.int8)
    before = np.full(n, -1, np.int32)
    touch = np.full(n, -1, np.int64)
    own = np.full(n, -1, np.int64)
    at = index[fault >= 0]
    earlier = at - 1
    has = (at > 0) & (earlier >= group[at])
    who, prev = fault[at[has]], earlier[has]
    before[who] = fault[prev]
    touch[who] = time[prev]
    mine = last_own[prev] >= group[prev]
    own[who[mine]] = time[last_own[prev[mine]]]
    prior[who] = _state(kind[prev], mine, area[who])

    del at, earlier, who, prev, mine, has
    # In earlier lives, through links. Failed faults and first faults of a life get here.
    life = np.searchsorted(np.array(run.lives.key, np.int64), run.key, side="right") - 1
    life[(run.key < 0) | (run.key >= UNSEEN_KEY)] = -1
    table = _Table(run)
    inherited = np.zeros(n, bool)
    dropped = np.zeros(n, bool)
    todo = np.flatnonzero((prior == Prior.NONE) & (life >= 0))
    cur_key, cur_life = run.key[todo], life[todo]
    drop = np.zeros(len(todo), bool)
    for _ in range(64):
        link = table.link[cur_life]
        go = link != 0
        todo, cur_key, cur_life, drop, link = todo[go], cur_key[go], cur_life[go], drop[go], link[go]
        if not len(todo):
            break
        cut = table.time[cur_life]
        drop = drop | (link == DROP_LINK)
        dropped[todo[(link == DROP_LINK) & table.populated[cur_life]]] = True
        inherited[todo[(link == FORK_LINK) & ~drop]] = True
        cur_key = table.parent[cur_life] + (cur_key - table.key[cur_life])
        cur_life = np.searchsorted(table.key, cur_key, side="right") - 1
        hit = _last(key, time, cur_key, cut)
        found = hit >= 0
        f = found & ~drop
        prior[todo[f]] = _state(kind[hit[f]], last_own[hit[f]] >= group[hit[f]], area[todo[f]])
        dropped[todo[found & drop]] = True
        rest = ~found
        todo, cur_key, cur_life, drop = todo[rest], cur_key[rest], cur_life[rest], drop[rest]

    populated = state_column(run.lives, run.state, "populated", -1)
    writes = state_column(run.lives, run.state, "populated_write", 0) != 0
    by_call = (prior == Prior.NONE) & (populated >= 0) & (populated < faults.time)
    prior[by_call] = np.where(
        (area[by_call] == Area.ANON) & ~writes[by_call], int(Prior.ZERO), int(Prior.POPULATED)
    )
    origin = np.where(life >= 0, table.origin[np.maximum(life, 0)], int(Origin.UNSEEN))
    begun = np.where(life >= 0, table.time[np.maximum(life, 0)], -1)
    return History(prior, before, touch, own, inherited, dropped, origin, life, begun)


class _Table:
    # Lives as columns; one spare row, so that an empty capture needs no special case.
    def __init__(self, run: Replayed) -> None:
        lives = run.lives
        self.key = np.array(lives.key or [0], np.int64)
        self.link = np.array(lives.link or [0], np.int64)
        self.parent = np.array(lives.parent or [-1], np.int64)
        self.time = np.array(lives.time or [-1], np.int64)
        self.origin = np.array(lives.origin or [0], np.int64)
        self.populated = np.array(lives.populated or [False], bool)


def _state(kind: I64, owned: Bool, area: I64) -> I64:
    read = np.select(
        [area == Area.ANON, area == Area.FILE, area == Area.SHARED_FILE],
        [int(Prior.ZERO), int(Prior.FILE), int(Prior.FILE)],
        int(Prior.SHARED),
    )
    shared = (area != Area.ANON) & (area != Area.FILE)
    return np.select(
        [shared, kind == SNAP_SWAP, owned, kind == SNAP_FILE, kind == SNAP_ZERO],
        [read, int(Prior.SWAPPED), int(Prior.ANON), int(Prior.FILE), int(Prior.ZERO)],
        read,
    ).astype(np.int8)


def _last(key: I64, time: I64, want: I64, cut: I64) -> I64:
    """Index of the last row of key `want` at or before `cut`, -1 where there is none."""
    lo = np.searchsorted(key, want, side="left")
    hi = np.searchsorted(key, want, side="right")
    out = np.full(len(want), -1, np.int64)
    # Binary search by time within each group, all at once.
    low, high = lo.copy(), hi.copy()
    while True:
        open_ = low < high
        if not open_.any():
            break
        mid = (low + high) // 2
        right = open_ & (time[np.minimum(mid, len(time) - 1)] <= cut)
        low = np.where(right, mid + 1, low)
        high = np.where(open_ & ~right, mid, high)
    good = low > lo
    out[good] = low[good] - 1
    return out


def _snapshot_rows(facts: Facts, run: Replayed) -> tuple[I64, I64, I64]:
    keys, times, kinds = [], [], []
    for mm, (starts, segs) in run.first_keys.items():
        pages = facts.first[mm].pages
        if pages is None or not len(pages) or not segs:
            continue
        addr = pages.addresses().astype(np.int64)
        state = pages.states()
        start = np.array(starts, np.int64)
        end = np.array([s.end for s in segs], np.int64)
        base = np.array([s.key for s in segs], np.int64)
        at = np.maximum(np.searchsorted(start, addr, side="right") - 1, 0)
        inside = (addr >= start[at]) & (addr < end[at])
        bits = [(state & np.uint32(b)) != 0 for b in (PageState.SWAPPED, PageState.FILE, PageState.ZERO)]
        kind = np.select(bits, [SNAP_SWAP, SNAP_FILE, SNAP_ZERO], SNAP_ANON)
        there = inside & ((state & np.uint32(PageState.PRESENT | PageState.SWAPPED)) != 0)
        keys.append((base[at] + ((addr - start[at]) >> PAGE_SHIFT))[there])
        kinds.append(kind[there].astype(np.int64))
        times.append(np.full(int(there.sum()), facts.first[mm].time_ns, np.int64))
    if not keys:
        empty = np.empty(0, np.int64)
        return empty, empty, empty
    return np.concatenate(keys), np.concatenate(times), np.concatenate(kinds)
