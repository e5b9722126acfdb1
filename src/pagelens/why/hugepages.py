"""Which faults made a huge page, and what pages are that came with one: columns for the evidence.

A fault does not tell its order. One that was alone in its 2 MiB block and slow made a huge page; the last snapshot may
show it. What came with it has no fault of its own: it is found by the block, in this address space and in those that
fork had it from, until something dropped it. So a huge page is one event of its block, after which each page of it is
its process's own (or the zero page, where it was only read).

Rejected: to group by the lives of pages (a call on a part of the block ends the life of that part alone).
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageState
from pagelens.vm.units import HPAGE_SIZE, PAGE_SHIFT
from pagelens.why.evidence import Huge, Prior
from pagelens.why.facts import Facts
from pagelens.why.history import History, last_of
from pagelens.why.lives import DROP_LINK, FORK_LINK, NO_LINK
from pagelens.why.nearby import last_drops, origins
from pagelens.why.replay import BLOCK, Replayed

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]
HUGE_SLOW = 20_000  # ns: zeroing 2 MiB takes longer than this, zeroing 4 KiB never does (both measured)
_PAGES = HPAGE_SIZE >> PAGE_SHIFT
_MOST = 1024  # huge pages of one block that came by writes over the huge zero page
_DEEPEST = 64  # forks that are followed up


class Blocks:
    """What became of 2 MiB blocks: events by address space and block, in order of time."""

    def __init__(self, run: Replayed) -> None:
        self._run = run
        lives = run.lives
        self._key, self._link, self._parent, self._time, self._mm = (
            np.array(c or [0], np.int64) for c in (lives.key, lives.link, lives.parent, lives.time, lives.mm)
        )
        self._where, self._when = np.empty(0, np.int64), np.empty(0, np.int64)
        self._own, self._sure = np.empty(0, bool), np.empty(0, bool)

    def add(self, mm: I64, block: I64, time: I64, own: Bool, sure: Bool) -> None:
        """Faults that made a huge page of the block; own: written, else the huge zero page. sure: not by the
        presence of other pages alone."""
        where = np.append(self._where, _place(mm, block))
        when, owned, sure = (
            np.append(self._when, time),
            np.append(self._own, own),
            np.append(self._sure, sure),
        )
        order = np.lexsort((when, where))
        self._where, self._when, self._own, self._sure = where[order], when[order], owned[order], sure[order]

    def before(self, rows: I64, life: I64) -> tuple[I64, Bool, Bool]:
        """(ns of the last event that the page of each fault came with or -1, whether it was written, whether it was of
        this address space). life: of each of `rows`."""
        faults = self._run.faults
        when = np.full(len(rows), -1, np.int64)
        own, mine = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        block = (faults.addr[rows] // np.uint64(HPAGE_SIZE)).astype(np.int64)
        todo, key, until = np.arange(len(rows)), self._run.key[rows], faults.time[rows].astype(np.int64)
        for depth in range(_DEEPEST):
            if not len(todo) or not len(self._where):
                break
            hit = last_of(self._where, self._when, _place(self._mm[life], block[todo]), until - 1)
            found = (hit >= 0) & (self._when[np.maximum(hit, 0)] >= self._time[life])
            at = todo[found]
            when[at], own[at], mine[at] = self._when[hit[found]], self._own[hit[found]], depth == 0
            up = ~found & (self._link[life] == FORK_LINK)
            todo, key, until, life = todo[up], key[up], self._time[life[up]], life[up]
            key = self._parent[life] + key - self._key[life]
            life = np.searchsorted(self._key, key, side="right") - 1
        return when, own, mine

    @property
    def none(self) -> bool:
        """Whether no huge page is known."""
        return not len(self._where)

    def since(self, mm: int, block: int, begun: int, until: int) -> bool:
        """Whether an event was in [begun, until)."""
        place = int(_place(np.int64(mm), np.int64(block)))
        low, high = np.searchsorted(self._where, [place, place + 1])
        times = self._when[low:high][self._sure[low:high]]
        return bool(np.any((times >= begun) & (times < until)))


def _place(mm: Any, block: Any) -> Any:
    return (mm << 36) | block


def huge_pages(
    facts: Facts, run: Replayed, past: History, prior: I64, present: Bool, write: Bool
) -> tuple[I64, I64, Blocks]:
    """(Huge of each fault, ns at which its page came with a huge one or -1, the blocks).

    prior, and own of `past`, are set right where a page came with a huge one."""
    faults = run.faults
    out = np.full(len(faults), int(Huge.NO), np.int8)
    blocks, came = Blocks(run), np.full(len(faults), -1, np.int64)
    rows = np.flatnonzero(((run.flags & BLOCK) != 0) & ~faults.failed & (past.life >= 0))
    if not len(rows):
        return out, came, blocks
    seq = np.array(run.lives.seq or [0], np.int64)
    block = (faults.addr[rows] // np.uint64(HPAGE_SIZE)).astype(np.int64)
    born = seq[past.life[rows]]
    order = np.lexsort((faults.time[rows], block, born, faults.mm[rows]))
    rows, block, born = rows[order], block[order], born[order]
    mm = faults.mm[rows].astype(np.int64)
    new = np.ones(len(rows), bool)
    new[1:] = (mm[1:] != mm[:-1]) | (born[1:] != born[:-1]) | (block[1:] != block[:-1])
    group = np.cumsum(new) - 1
    first = rows[new]
    # Another thread's fault that was under way when the first one completed says nothing against a huge page.
    begun = faults.time[rows] - np.maximum(faults.latency[rows], 0)
    beside = ~new & ~present[rows] & (begun <= faults.time[first][group])
    absent = np.bincount(group, weights=(~present[rows] & ~beside).astype(np.float64))
    alone = absent == 1
    shown = _huge_in_last(facts, run, past, first)
    made = ~present[first] & (shown | (alone & (faults.latency[first] >= HUGE_SLOW)))
    zero = made & ~write[first]
    # A read maps the huge zero page in a moment; that it did, later writes to present pages tell.
    more = np.bincount(group) > 1
    lone = ~present[first] & ~write[first] & alone
    # Where the kernel has a huge zero page, a read of an empty block that may be huge maps it.
    zero |= lone & (more | bool(facts.settings.get("thp_zero_page")))
    empty = _empty_before(facts, run, past, rows, first, made | lone)
    perhaps = (made | zero) & ~empty
    made, zero, lone = made & empty, zero & empty, lone & empty
    any_, tells = made | zero, made | zero | lone
    blocks.add(
        mm[new][tells], block[new][tells], faults.time[first[tells]], ~(zero | lone)[tells], any_[tells]
    )
    out[first[any_]] = int(Huge.MADE)
    out[first[perhaps]] = int(Huge.PERHAPS)
    out[rows[beside & any_[group]]] = int(Huge.MADE)
    writes = present[rows] & write[rows]
    _over_zero(run, past, blocks, rows[writes], block[writes])
    when, own, mine = blocks.before(rows, past.life[rows])
    source = past.source[rows]
    later = (when > np.where(source >= 0, faults.time[np.maximum(source, 0)], -1)) & (when > past.touch[rows])
    at = rows[later & present[rows]]
    prior[at] = np.where(own[later & present[rows]], int(Prior.ANON), int(Prior.ZERO))
    came[rows[later]] = when[later]
    at = rows[later & own & mine]
    past.own[at] = np.maximum(past.own[at], when[later & own & mine])
    inside = (when >= 0) & (out[rows] == Huge.NO) & present[rows]
    out[rows[inside]] = np.where(own[inside], int(Huge.INSIDE), int(Huge.READ))
    return out, came, blocks


def _over_zero(run: Replayed, past: History, blocks: Blocks, rows: I64, block: I64) -> None:
    # A write over the huge zero page gives the whole block its own (6.18), or splits it for one small page (to 6.12),
    # which is quick.
    faults = run.faults
    whole = faults.latency[rows] >= HUGE_SLOW
    rows, block = rows[whole], block[whole]
    order = np.lexsort((faults.time[rows], block))
    rows, block = rows[order], block[order]
    for _ in range(_MOST):
        when, own, _ = blocks.before(rows, past.life[rows])
        left = (when >= 0) & ~own
        rows, block = rows[left], block[left]
        if not len(rows):
            break
        _, at = np.unique(
            block, return_index=True
        )  # the earliest of each, whoever wrote: it may go on by fork
        mm = faults.mm[rows[at]].astype(np.int64)
        blocks.add(mm, block[at], faults.time[rows[at]], np.ones(len(at), bool), np.ones(len(at), bool))
        rows, block = np.delete(rows, at), np.delete(block, at)


def _empty_before(facts: Facts, run: Replayed, past: History, rows: I64, first: I64, asked: Bool) -> Bool:
    # Whether nothing stood in the block when its first fault came, as far as calls and forks tell: a huge page needs an
    # empty one. rows: all in blocks; first: of each group; asked: which of them.
    lives, faults = run.lives, run.faults
    out = np.ones(len(first), bool)
    ordered = rows[np.argsort(run.key[rows])]
    keys, times = run.key[ordered], faults.time[ordered]
    place = _place(
        faults.mm[rows].astype(np.int64), (faults.addr[rows] // np.uint64(HPAGE_SIZE)).astype(np.int64)
    )
    by_place = np.argsort(place)
    places, when = place[by_place], faults.time[rows[by_place]]
    there: dict[int, set[int]] = {}  # by address space: blocks with pages in its first snapshot
    index = (faults.addr[first] >> np.uint64(PAGE_SHIFT)).astype(np.int64) & (_PAGES - 1)
    for i in np.flatnonzero(asked).tolist():
        life, low = int(past.life[first[i]]), int(run.key[first[i]] - index[i])
        mm, begun = int(faults.mm[first[i]]), int(faults.time[first[i]])
        if lives.seq[life] < 0:
            if mm not in there:
                there[mm] = _blocks_at_first(facts, mm)
            out[i] = int(faults.addr[first[i]]) // HPAGE_SIZE not in there[mm]
        elif lives.link[life] != FORK_LINK:
            # All of the block was mapped by one call, or went with one; else nothing of it had been touched.
            ends = (
                bisect.bisect_right(lives.key, low) - 1,
                bisect.bisect_right(lives.key, low + _PAGES - 1) - 1,
            )
            whole = (
                all(e >= 0 and lives.seq[e] == lives.seq[life] for e in ends) and low + _PAGES <= lives.end
            )
            if not whole and lives.link[life] == DROP_LINK:
                out[i] = False
            elif not whole:
                here = _place(mm, int(faults.addr[first[i]]) // HPAGE_SIZE)
                a, b = np.searchsorted(places, [here, here + 1])
                out[i] = not np.any(when[a:b] < begun)
        spans = [(low, low + _PAGES)] if lives.link[life] == FORK_LINK else []
        while spans and out[i]:
            above = [span for low, high in spans for span in _before_fork(run, low, high)]
            for low, high, until in above:
                a, b = np.searchsorted(keys, [low, high])
                out[i] &= not np.any(times[a:b] < until)
            spans = [(low, high) for low, high, _ in above]
    return out


def _blocks_at_first(facts: Facts, mm: int) -> set[int]:
    snapshot = facts.first.get(mm)
    if snapshot is None or snapshot.pages is None or not len(snapshot.pages):
        return set()
    return set(np.unique(snapshot.pages.addresses() // np.uint64(HPAGE_SIZE)).tolist())


def _before_fork(run: Replayed, low: int, high: int) -> list[tuple[int, int, int]]:
    # What keys [low, high) had been in the parent, and until when (ns).
    lives, out = run.lives, []
    life = max(bisect.bisect_right(lives.key, low) - 1, 0)
    while life < len(lives.key) and lives.key[life] < high:
        first = lives.key[life]
        end = lives.key[life + 1] if life + 1 < len(lives.key) else lives.end
        if lives.link[life] == FORK_LINK:
            step = lives.parent[life] - first
            out.append((max(low, first) + step, min(high, end) + step, lives.time[life]))
        life += 1
    return out


def dropped_in_block(run: Replayed, past: History, blocks: Blocks, prior: I64, present: Bool) -> Bool:
    """bool[n]: a part of a huge page that was dropped, and so had been in use, though only the block's first page ever
    faulted."""
    out = np.zeros(len(prior), bool)
    lives = run.lives
    rows = np.flatnonzero((prior == Prior.NONE) & ~past.dropped & ~present & (past.life >= 0))
    rows = rows[last_drops(lives)[past.life[rows]] >= 0]
    if not len(rows) or blocks.none:
        return out
    block = (run.faults.addr[rows] // np.uint64(HPAGE_SIZE)).astype(np.int64)
    for row, here in zip(rows.tolist(), block.tolist(), strict=True):
        life, page = int(past.life[row]), int(run.key[row])
        drop = False
        while lives.link[life] != NO_LINK and not out[row]:
            drop |= lives.link[life] == DROP_LINK
            if lives.link[life] == FORK_LINK and not past.copied.to(
                lives.mm[life], int(origins(lives, run.key[[row]])[0][0])
            ):
                drop = False  # it was not here to be dropped, unless it had gone before that fork
            page, until = page + lives.parent[life] - lives.key[life], lives.time[life]
            life = bisect.bisect_right(lives.key, page) - 1
            out[row] = drop and blocks.since(lives.mm[life], here, lives.time[life], until)
    return out


def _huge_in_last(facts: Facts, run: Replayed, past: History, first: I64) -> Bool:
    faults = run.faults
    out = np.zeros(len(first), bool)
    for mm in np.unique(faults.mm[first]).tolist():
        last = facts.last.get(mm)
        if last is None or last.pages is None:
            continue
        runs = last.pages.where(PageState.HUGE)
        if not len(runs):
            continue
        here = np.flatnonzero(faults.mm[first] == mm)
        _, _, keys, _ = run.spaces[mm].columns()
        born = np.array(run.lives.key, np.int64)
        lives = np.searchsorted(born, keys, side="right") - 1
        here = here[np.isin(past.life[first[here]], lives)]  # nothing has dropped it since
        addr = faults.addr[first[here]] & ~np.uint64(0xFFF)
        at = np.searchsorted(runs.start, addr, side="right") - 1
        size = runs.count << np.uint64(PAGE_SHIFT)
        near = np.maximum(at, 0)
        out[here] = (at >= 0) & (addr < runs.start[near] + size[near])
    return out
