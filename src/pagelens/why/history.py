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
from pagelens.why.lives import DROP_LINK, FORK_LINK, NO_LINK, UNSEEN_KEY
from pagelens.why.nearby import Copied
from pagelens.why.replay import Replayed, state_column

I64 = npt.NDArray[np.signedinteger[Any]]
Bool = npt.NDArray[np.bool_]

# Kinds of rows.
READ, WRITE, SNAP_FILE, SNAP_ANON, SNAP_ZERO, SNAP_SWAP = range(6)


@dataclass(frozen=True, slots=True)
class History:
    """Columns beside the faults of `Replayed` (integers of as many bits as they need).

    prior: Prior. before: row of the fault before this one on the page (-1 none); source: the same, or of an ancestor
    that fork had the page from. touch: ns of the last row in this life (-1), own: ns of the last write in it (-1).
    inherited: bool, by links. taken: the life that began when advice or a cut took the page away, after which nobody
    touched it (-1). paged: MADV_PAGEOUT may have taken it before that.
    origin: Origin. life: index into Lives (-1 none). times: ns at which each life began, and -1 behind them.
    unsure: prior rests on a fault whose access was not recorded. perhaps: dropped, if a fork copied it,
    which cannot be told. copied: what forks copied.
    """

    prior: I64
    before: I64
    source: I64
    touch: I64
    own: I64
    inherited: Bool
    taken: I64
    paged: Bool
    origin: I64
    life: I64
    times: I64
    unsure: Bool
    perhaps: Bool
    copied: Copied

    @property
    def dropped(self) -> Bool:
        """Whether the page had been in use until something took it away."""
        return self.taken >= 0

    def begun(self, rows: I64) -> I64:
        """ns at which the life of each of `rows` began, -1 where there is none."""
        return np.asarray(self.times[self.life[rows]])


def trace(facts: Facts, run: Replayed) -> History:
    """The history of every fault."""
    faults = run.faults
    n = len(faults)
    area = state_column(run.lives, run.state, "area", int(Area.UNMAPPED))
    write = (faults.error < 0) | ((faults.error & 2) != 0)
    key, time, kind, fault = _rows(facts, run, write)
    blind = np.append(faults.error < 0, False)  # by `fault`: -1 is a snapshot's
    del write
    index = np.arange(len(key), dtype=np.int32)
    new = np.ones(len(key), bool)
    new[1:] = key[1:] != key[:-1]
    group = np.maximum.accumulate(np.where(new, index, 0)) if len(key) else index
    owned = (kind == WRITE) | (kind == SNAP_ANON) | (kind == SNAP_SWAP)
    last_own = np.maximum.accumulate(np.where(owned, index, -1)) if len(key) else index

    # In the same life: the row just before.
    prior = np.full(n, int(Prior.NONE), np.int8)
    unsure = np.zeros(n, bool)
    before = np.full(n, -1, np.int32)
    source = np.full(n, -1, np.int32)
    touch = np.full(n, -1, np.int64)
    own = np.full(n, -1, np.int64)
    at = index[fault >= 0]
    earlier = at - 1
    has = (at > 0) & (earlier >= group[at])
    who, prev = fault[at[has]], earlier[has]
    before[who] = source[who] = fault[prev]
    touch[who] = time[prev]
    mine = last_own[prev] >= group[prev]
    own[who[mine]] = time[last_own[prev[mine]]]
    prior[who] = _state(kind[prev], mine, area[who])
    unsure[who[mine]] = blind[fault[last_own[prev[mine]]]]

    del at, earlier, who, prev, mine, has
    # In earlier lives, through links. Failed faults and first faults of a life get here.
    table = _Table(run)
    shared = (area != Area.ANON) & (area != Area.FILE)
    copied = Copied(run, key, time, owned & ~np.append(shared, False)[fault] if run.family.parent else owned)
    life = _lives(run)
    inherited = np.zeros(n, bool)
    linked = np.append(table.link != NO_LINK, False)
    todo = np.flatnonzero(np.take(linked, life) & (prior == Prior.NONE)) if linked.any() else index[:0]
    cur_key, cur_life = run.key[todo], life[todo]
    drop = np.zeros(len(todo), bool)
    taker = np.full(len(todo), -1, np.int32)  # the life that began when the page was taken away
    taken = np.full(n, -1, np.int32)
    paged = np.zeros(n, bool)
    out = np.zeros(
        len(todo), bool
    )  # a fork on the way left the page out: only what was gone before it counts
    doubt, perhaps = np.zeros(n, bool), np.zeros(n, bool)
    for _ in range(64):
        link = table.link[cur_life]
        # A child maps shared memory anew: what its parent had of it is not its own story.
        go = (link != NO_LINK) & ((link != FORK_LINK) | ~shared[todo])
        todo, cur_key, cur_life, drop, link = todo[go], cur_key[go], cur_life[go], drop[go], link[go]
        if not go.all():
            out, taker = out[go], taker[go]
        # What had only been read before a fork came with it only where fork copied.
        forked = np.flatnonzero((link == FORK_LINK) & drop)
        if len(forked):
            gone = forked[~copied.into(cur_key[forked], cur_life[forked])]
            doubt[todo[gone]] |= copied.unsure(cur_key[gone], cur_life[gone])
            out[gone], drop[gone], taker[gone] = True, False, -1
        np.copyto(taker, cur_life, where=link == DROP_LINK, casting="unsafe")
        if not len(todo):
            break
        cut = table.time[cur_life]
        drop = drop | (link == DROP_LINK)
        by_call = np.where(link == DROP_LINK, table.populated[cur_life], -1)
        inherited[todo[(link == FORK_LINK) & ~drop]] = True
        cur_key = table.parent[cur_life] + (cur_key - table.key[cur_life])
        cur_life = np.searchsorted(table.key, cur_key, side="right") - 1
        hit = last_of(key, time, cur_key, cut)
        found = hit >= 0
        # Populated before a fork that left it out.
        older = np.flatnonzero((by_call >= 0) & (by_call < table.time[cur_life]))
        older = older[table.link[cur_life[older]] == FORK_LINK]
        if len(older):
            gone = older[~copied.into(cur_key[older], cur_life[older])]
            perhaps[todo[gone]] |= copied.unsure(cur_key[gone], cur_life[gone])
            by_call[gone] = -1
        f = found & ~drop & ~out
        prior[todo[f]] = _state(kind[hit[f]], last_own[hit[f]] >= group[hit[f]], area[todo[f]])
        unsure[todo[f]] = blind[fault[np.maximum(last_own[hit[f]], 0)]]
        source[todo[f]] = fault[hit[f]]
        perhaps[todo[found & out & ~drop]] |= doubt[todo[found & out & ~drop]]
        had = found & drop
        had |= by_call >= 0
        had &= taken[todo] < 0
        taken[todo[had]] = taker[had]
        used = np.maximum(np.where(found, time[hit], -1), by_call)[had]
        paged[todo[had]] = used < table.paged[taker[had]]
        rest = ~found
        todo, cur_key, cur_life, drop = todo[rest], cur_key[rest], cur_life[rest], drop[rest]
        out, taker = out[rest], taker[rest]

    populated = state_column(run.lives, run.state, "populated", -1)
    by_call = np.flatnonzero((populated >= 0) & (prior == Prior.NONE) & (populated < faults.time))
    prior[by_call] = np.where(area[by_call] == Area.ANON, int(Prior.ZERO), int(Prior.POPULATED))
    begun = np.append(table.time, -1)
    _owned_by_calls(run, prior, own, begun[life])
    touch = np.where((populated > touch) & (populated < faults.time), populated, touch)
    dropped = taken >= 0
    origins = np.append(table.origin, int(Origin.UNSEEN)).astype(np.int8)
    origin = np.take(origins, life)
    origin[dropped] = origins[taken[dropped]]
    return History(
        prior,
        before,
        source,
        touch,
        own,
        inherited,
        taken,
        paged,
        origin,
        life,
        np.append(table.time, -1),
        unsure,
        perhaps & ~dropped,
        copied,
    )


def _owned_by_calls(run: Replayed, prior: I64, own: I64, begun: I64) -> None:
    """What calls populated with write faults is one's own, whatever it was before. begun: ns at which the page's life
    began; a page that an earlier life owned so is inherited."""
    when = state_column(run.lives, run.state, "populated_own", -1)
    rows = np.flatnonzero((when >= 0) & (when < run.faults.time))
    rows = rows[np.isin(prior[rows], [Prior.NONE, Prior.ZERO, Prior.FILE, Prior.POPULATED])]
    prior[rows] = int(Prior.ANON)
    rows = np.flatnonzero((when >= begun) & (when > own) & (when < run.faults.time))
    own[rows] = when[rows]


def _rows(facts: Facts, run: Replayed, write: Bool) -> tuple[I64, I64, I64, I64]:
    """(key, ns, kind, row of `run.faults` or -1) of every completed fault and every page of the first snapshots.

    In order of (key, ns); the snapshot's first where both are of one moment."""
    faults = run.faults
    keep = ~faults.failed & (run.key >= 0)
    if keep.all():
        key, time = run.key, faults.time
        fault = np.arange(len(key), dtype=np.int32)
        kind = np.where(write, np.int8(WRITE), np.int8(READ))
        mm = faults.mm
    else:
        fault = np.flatnonzero(keep).astype(np.int32)
        key, time, mm = run.key[fault], faults.time[fault], faults.mm[fault]
        kind = np.where(write[fault], np.int8(WRITE), np.int8(READ))
    # Faults are in order of (mm, ns), and a key is of one mm: with the snapshots' rows at their moments, a stable sort
    # by key alone gives both.
    snaps = snapshot_rows(facts, run)
    if snaps:
        at = []
        for number, when, keys, _ in snaps:
            lo, hi = np.searchsorted(mm, [number, number + 1])
            at.append(np.full(len(keys), lo + int(np.searchsorted(time[lo:hi], when)), np.int64))
        where = np.concatenate(at)
        key = np.insert(key, where, np.concatenate([keys for _, _, keys, _ in snaps]))
        time = np.insert(time, where, np.concatenate([np.full(len(k), t, np.int64) for _, t, k, _ in snaps]))
        kind = np.insert(kind, where, np.concatenate([kinds for _, _, _, kinds in snaps]))
        fault = np.insert(fault, where, -1)
    if bool(np.all(key[1:] >= key[:-1])):
        return key, time, kind, fault
    order = np.argsort(key, kind="stable")
    return key[order], time[order], kind[order], fault[order]


def _lives(run: Replayed) -> I64:
    # The life of each fault's page: index into Lives, -1 where nothing is known of it.
    keys = np.array(run.lives.key, np.int64)
    life = (np.searchsorted(keys, run.key, side="right") - 1).astype(np.int32)
    life[(run.key < 0) | (run.key >= UNSEEN_KEY)] = -1
    return life


class _Table:
    # Lives as columns; one spare row, so that an empty capture needs no special case.
    def __init__(self, run: Replayed) -> None:
        lives = run.lives
        self.key = np.array(lives.key or [0], np.int64)
        self.link = np.array(lives.link or [0], np.int64)
        self.parent = np.array(lives.parent or [-1], np.int64)
        self.time = np.array(lives.time or [-1], np.int64)
        self.origin = np.array(lives.origin or [0], np.int64)
        self.populated = np.array(lives.populated or [-1], np.int64)
        self.paged = np.array(lives.paged or [-1], np.int64)


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


def last_of(key: I64, time: I64, want: I64, cut: I64) -> I64:
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


def snapshot_rows(facts: Facts, run: Replayed) -> list[tuple[int, int, I64, I64]]:
    """(mm, ns, keys, kinds) of the pages that each first snapshot shows, in order of mm."""
    out = []
    for mm, (starts, segs) in sorted(run.first_keys.items()):
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
        keys = (base[at] + ((addr - start[at]) >> PAGE_SHIFT))[there]
        out.append((mm, facts.first[mm].known_ns, keys, kind[there].astype(np.int8)))
    return out
