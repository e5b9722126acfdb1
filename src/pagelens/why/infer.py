"""Error codes that were not recorded (perf without privilege, --detail lean), inferred from the last
snapshot.

A page that faulted once and stands in the last snapshot as the zero page was read; as a page of one's own it
was written; as the file's page it was read. With two faults, the first read and the second wrote. Everything
else stays open, and so does what a fork may have had a part in. A verdict on an inferred code is never more
than `likely`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageState
from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Area, Origin
from pagelens.why.facts import Facts
from pagelens.why.replay import Replayed, state_column

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]

READ_ABSENT, WRITE_ABSENT, WRITE_PRESENT = 4, 6, 7


def infer(facts: Facts, run: Replayed) -> Bool:
    """Fill in run.faults.error where it can be told; bool[n]: which rows."""
    faults = run.faults
    n = len(faults)
    filled = np.zeros(n, bool)
    rows = np.flatnonzero((faults.error < 0) & ~faults.failed & (run.key >= 0))
    if not len(rows):
        return filled
    order = np.lexsort((faults.time[rows], run.key[rows]))
    rows = rows[order]
    key = run.key[rows]
    new = np.ones(len(rows), bool)
    new[1:] = key[1:] != key[:-1]
    group = np.cumsum(new) - 1
    size = np.bincount(group)[group]
    first = np.flatnonzero(new)[group] == np.arange(len(rows))
    own, zero, of_file = _at_the_end(facts, run, rows)
    area = state_column(run.lives, run.state, "area", int(Area.UNMAPPED))[rows]
    anon, private_file = area == Area.ANON, area == Area.FILE
    error = np.full(len(rows), -1, np.int64)
    once, twice = size == 1, size == 2
    error[once & (anon & zero | private_file & of_file)] = READ_ABSENT
    error[once & (anon | private_file) & own] = WRITE_ABSENT
    error[twice & (anon | private_file) & own & first] = READ_ABSENT
    error[twice & (anon | private_file) & own & ~first] = WRITE_PRESENT
    # Shared memory is mapped by whatever access comes first; the verdict is the same for both.
    error[once & ~anon & ~private_file & (area != Area.UNMAPPED) & (area != Area.UNSEEN)] = READ_ABSENT
    error[_forked(run, rows, np.flatnonzero(new)[group])] = -1
    told = error >= 0
    codes = np.asarray(faults.error).copy()
    codes[rows[told]] = error[told]
    filled[rows[told]] = True
    run.faults = replace(faults, error=codes)
    return filled


def _forked(run: Replayed, rows: I64, leader: I64) -> Bool:
    # A fork makes a second fault, or a child's first, either a copy or something new: left open. So is a first one of
    # what had been mapped before the fork: the kernel may have touched it unseen.
    faults, lives = run.faults, run.lives
    life = np.searchsorted(np.array(lives.key, np.int64), run.key[rows], side="right") - 1
    out = np.array(lives.origin or [0], np.int64)[np.maximum(life, 0)] == Origin.FORK
    begun = np.array(lives.time or [-1], np.int64)[np.maximum(life, 0)]
    start, end = np.minimum(begun, faults.time[rows[leader]]), faults.time[rows]
    for mm, times in run.family.forks.items():
        when = np.sort(np.array(times, np.int64))
        mine = faults.mm[rows] == mm
        apart = np.searchsorted(when, end[mine]) > np.searchsorted(when, start[mine])
        pages = run.key[rows[mine]][apart]
        out |= (faults.mm[rows] == mm) & np.isin(run.key[rows], pages)
    return np.asarray(out, dtype=bool)


def _at_the_end(facts: Facts, run: Replayed, rows: I64) -> tuple[Bool, Bool, Bool]:
    """(a page of its own, the zero page, a page of the file) in the last snapshot, for each row."""
    faults = run.faults
    out = np.zeros((3, len(rows)), bool)
    mms = faults.mm[rows]
    for mm in np.unique(mms).tolist():
        last = facts.last.get(mm)
        if last is None or last.pages is None or not len(last.pages):
            continue
        here = np.flatnonzero(mms == mm)
        addr = faults.addr[rows[here]] & ~np.uint64(0xFFF)
        runs = last.pages
        at = np.maximum(np.searchsorted(runs.start, addr, side="right") - 1, 0)
        inside = (addr >= runs.start[at]) & (
            addr < runs.start[at] + (runs.count[at] << np.uint64(PAGE_SHIFT))
        )
        state = np.where(inside, runs.state[at], 0)
        present = (state & int(PageState.PRESENT)) != 0
        zero, shared = (state & int(PageState.ZERO)) != 0, (state & int(PageState.FILE)) != 0
        out[0, here] = present & ~zero & ~shared
        out[1, here] = present & zero
        out[2, here] = present & shared
    return out[0], out[1], out[2]
