"""Which faults made a huge page, and which came into one: columns for the evidence.

A fault does not tell its order. One that was alone in its 2 MiB block and slow made a huge page; the last snapshot may
show it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageState
from pagelens.vm.units import HPAGE_SIZE, PAGE_SHIFT
from pagelens.why.evidence import Huge, Prior
from pagelens.why.facts import Facts
from pagelens.why.history import History
from pagelens.why.nearby import last_drops, origins
from pagelens.why.replay import BLOCK, Replayed
from pagelens.why.space import DROP_LINK, FORK_LINK, NO_LINK

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]
HUGE_SLOW = 20_000  # ns: zeroing 2 MiB takes longer than this, zeroing 4 KiB never does (both measured)


def huge_pages(facts: Facts, run: Replayed, past: History, present: Bool, write: Bool) -> tuple[I64, I64]:
    """Huge of each fault, and ns at which a write of this address space had made all of its block its own (-1)."""
    faults = run.faults
    out = np.full(len(faults), int(Huge.NO), np.int8)
    rows = np.flatnonzero(((run.flags & BLOCK) != 0) & ~faults.failed & (past.life >= 0))
    own = np.full(len(faults), -1, np.int64)
    if not len(rows):
        return out, own
    block = (faults.addr[rows] // np.uint64(HPAGE_SIZE)).astype(np.int64)
    order = np.lexsort((faults.time[rows], block, past.life[rows]))
    rows, block = rows[order], block[order]
    life = past.life[rows]
    new = np.ones(len(rows), bool)
    new[1:] = (life[1:] != life[:-1]) | (block[1:] != block[:-1])
    group = np.cumsum(new) - 1
    first = rows[new]
    # Another thread's fault that was under way when the first one completed says nothing against a huge page.
    begun = faults.time[rows] - np.maximum(faults.latency[rows], 0)
    beside = ~new & ~present[rows] & (begun <= faults.time[first][group])
    absent = np.bincount(group, weights=(~present[rows] & ~beside).astype(np.float64))
    alone = absent == 1
    shown = _huge_in_last(facts, run, first)
    made = ~present[first] & (shown | (alone & (faults.latency[first] >= HUGE_SLOW)))
    zero = made & ~write[first]
    # A read maps the huge zero page in a moment; that it did, later writes to present pages tell.
    more = np.bincount(group) > 1
    zero |= ~present[first] & ~write[first] & alone & more
    later = ~new
    # A write over the huge zero page gives the whole block its own (6.18), or splits it for one small page (to 6.12).
    whole = zero[group] & present[rows] & write[rows] & (faults.latency[rows] >= HUGE_SLOW)
    since = np.full(len(first), len(rows))
    at = np.flatnonzero(whole)
    np.minimum.at(since, group[at], at)
    owned = np.arange(len(rows)) > since[group]
    by = np.append(rows, -1)[since]  # the write over the huge zero page
    when = np.where(by >= 0, faults.time[by], np.where(made & ~zero & write[first], faults.time[first], -1))
    inside = later & ((made & ~zero)[group] | owned)
    own[rows[inside]] = when[group[inside]]
    out[rows[later & zero[group]]] = int(Huge.READ)
    out[rows[later & ((made & ~zero)[group] | owned)]] = int(Huge.INSIDE)
    out[first[made | zero]] = int(Huge.MADE)
    out[rows[beside & (made | zero)[group]]] = int(Huge.MADE)
    return out, own


def dropped_in_block(run: Replayed, past: History, huge: I64, present: Bool) -> Bool:
    """bool[n]: a part of a huge page that was dropped, and so had been in use, though only the block's first page ever
    faulted."""
    out = np.zeros(len(huge), bool)
    made = np.flatnonzero(huge == Huge.MADE)
    if not len(made):
        return out
    lives = run.lives
    key, link, parent = (np.array(c or [0], np.int64) for c in (lives.key, lives.link, lives.parent))
    rows = np.flatnonzero((past.prior == Prior.NONE) & ~past.dropped & ~present & (past.life >= 0))
    rows = rows[last_drops(lives)[past.life[rows]] >= 0]
    if not len(rows):
        return out
    block = (run.faults.addr // np.uint64(HPAGE_SIZE)).astype(np.int64)
    whose = zip(past.life[made].tolist(), block[made].tolist(), strict=True)
    since = dict(zip(whose, run.faults.time[made].tolist(), strict=True))
    for row in rows.tolist():
        life, page = int(past.life[row]), int(run.key[row])
        drop = False
        while link[life] != NO_LINK and not out[row]:
            drop |= bool(link[life] == DROP_LINK)
            if link[life] == FORK_LINK and not past.copied.to(
                lives.mm[life], int(origins(lives, run.key[[row]])[0][0])
            ):
                break
            page, until = page + int(parent[life]) - int(key[life]), lives.time[life]
            life = int(np.searchsorted(key, page, side="right")) - 1
            out[row] = drop and since.get((life, int(block[row])), until) < until
    return out


def _huge_in_last(facts: Facts, run: Replayed, first: I64) -> Bool:
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
        addr = faults.addr[first[here]] & ~np.uint64(0xFFF)
        at = np.searchsorted(runs.start, addr, side="right") - 1
        size = runs.count << np.uint64(PAGE_SHIFT)
        near = np.maximum(at, 0)
        out[here] = (at >= 0) & (addr < runs.start[near] + size[near])
    return out
