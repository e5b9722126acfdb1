"""Pages that no fault of their own had mapped: fault-around, and what fork copies.

A read fault on a file or on shared memory maps its neighbours too, those of the 16 pages around it that the page cache
has (do_fault_around, filemap_map_pages, mm/filemap.c). No event says so. It matters once: where advice or a hole has
taken such a page away, the fault that brings it back is not the first use of it. A neighbour's read before that is
taken as having mapped it: likely, for the page may have come into the cache only since.

fork leaves out the page tables of a private mapping that nobody has written to (vma_needs_copy: no anon_vma). What a
parent had read of it, the child has not.

Rejected: to follow fault-around page by page (what the cache held at each moment is not recorded).
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Area
from pagelens.why.replay import Replayed, state_column
from pagelens.why.space import DROP_LINK, FORK_LINK, UNSEEN_KEY, Lives

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]
_MOST = 1 << 16  # pages of one call whose windows are looked at
WINDOW = 16  # pages: fault_around_bytes
AROUND = (Area.FILE, Area.SHARED_FILE, Area.SHMEM)


def origins(lives: Lives, key: I64) -> tuple[I64, I64]:
    """(key, life) of each page in the mapping that its story began with: back over drops and forks. key: of known
    lives."""
    first, parent, link = (np.array(c or [0], np.int64) for c in (lives.key, lives.parent, lives.link))
    linked = (link == DROP_LINK) | (link == FORK_LINK)
    at = np.searchsorted(first, key, side="right") - 1
    while (back := linked[at]).any():
        key = np.where(back, parent[at] + key - first[at], key)
        at = np.searchsorted(first, key, side="right") - 1
    return key, at


def last_drops(lives: Lives) -> I64:
    """int64[lives]: ns of the last drop in the story of each, in its own address space or before a fork; -1 without."""
    first, parent, link, time = (
        np.array(c or [0], np.int64) for c in (lives.key, lives.parent, lives.link, lives.time)
    )
    at = np.arange(len(first))
    while (forked := link[at] == FORK_LINK).any():
        at = np.where(forked, np.searchsorted(first, parent[at], side="right") - 1, at)
    return np.where(link[at] == DROP_LINK, time[at], -1)


class Copied:
    """Whether fork copied the page tables of a private mapping: only where somebody had written to it."""

    def __init__(self, run: Replayed, key: I64, time: I64, own: Bool) -> None:
        """key, time: pages that faulted or were there, ascending by key, and when; own: those that were a process's own
        from then on."""
        self._lives, self._parents = run.lives, run.family.parent
        self._mm = np.array(run.lives.mm or [-1], np.int64)
        self._first: dict[tuple[int, int], int] = {}
        if not self._parents:
            return
        starts = np.array(run.lives.key or [0], np.int64)
        key, time = key[own], time[own]
        bounds = np.searchsorted(key, np.append(starts, UNSEEN_KEY))
        life = np.flatnonzero(np.diff(bounds))  # with rows; those between two bounds are one life's
        if not len(life):
            return
        earliest = np.minimum.reduceat(time[: bounds[-1]], bounds[life])
        _, mapping = origins(run.lives, starts[life])
        for whose, when in zip(
            zip(mapping.tolist(), self._mm[life].tolist(), strict=True), earliest.tolist(), strict=True
        ):
            self._first[whose] = min(when, self._first.get(whose, when))

    def into(self, key: I64, life: I64) -> Bool:
        """bool[key]: for pages of lives that a fork began."""
        _, mapping = origins(self._lives, key)
        pairs, back = np.unique(np.stack((mapping, self._mm[life]), axis=1), axis=0, return_inverse=True)
        answers = np.array([self._written(root, child) for root, child in pairs.tolist()], bool)
        return np.asarray(answers[back.ravel()] if len(pairs) else np.zeros(0, bool))

    def to(self, child: int, key: int) -> bool:
        """Whether `child` got the tables of a page's mapping; key: as `origins` gives it."""
        return self._written(bisect.bisect_right(self._lives.key, key) - 1, child)

    def _written(self, mapping: int, child: int) -> bool:
        # By an ancestor, before it gave the mapping on.
        while (parent := self._parents.get(child)) is not None:
            if self._first.get((mapping, parent[0]), 1 << 62) < parent[1]:
                return True
            child = parent[0]
        return False


def _by_calls(run: Replayed) -> I64:
    # int64[n, 4]: mm, key, ns, page number of one page in each window of what calls populated with read faults.
    out = []
    for mm, space in run.spaces.items():
        for key, page, count, time in space.around:
            out += [(mm, key + i, time, page + i) for i in {*range(0, min(count, _MOST), WINDOW), count - 1}]
    return np.array(out, np.int64).reshape(-1, 4)


class Around:
    """The reads of files and shared memory, by faults and by calls that populate: each mapped its neighbours."""

    def __init__(self, run: Replayed, life: I64, copied: Copied) -> None:
        """life: of each fault, index into the lives (-1 none)."""
        faults, lives = run.faults, run.lives
        self._run, self._copied = run, copied
        self._parts: dict[
            tuple[str, int], I64
        ] = {}  # of each file: first byte, byte behind the last, ns, by MADV_REMOVE
        self._touches: dict[tuple[str, int], tuple[I64, I64]] = {}  # of each file: page and ns of its faults
        area = state_column(lives, run.state, "area", int(Area.UNMAPPED))
        held = np.isin(area, AROUND) & ~faults.failed & (life >= 0)
        rows = np.flatnonzero(held & (faults.error >= 0) & ((faults.error & 3) == 0))
        key, mapping = origins(lives, run.key[rows])
        mm, time = faults.mm[rows].astype(np.int64), faults.time[rows]
        page = (faults.addr[rows] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        calls = _by_calls(run)
        if len(calls):
            more, held_by = origins(lives, calls[:, 1])
            key, mapping = np.append(key, more), np.append(mapping, held_by)
            mm, time, page = (
                np.append(*pair) for pair in ((mm, calls[:, 0]), (time, calls[:, 2]), (page, calls[:, 3]))
            )
        order = np.lexsort((key, mm))
        # from_pte of do_fault_around: 16 pages from an aligned one on, or from the start of the vma.
        start = page - (key - np.array(lives.key or [0], np.int64)[mapping])
        low = np.maximum(page & -WINDOW, start)
        self._mm, self._key, self._time, self._page, self._low, self._mapping = (
            column[order] for column in (mm, key, time, page, low, mapping)
        )
        # Shared memory without a name has a page only once somebody, whoever, has touched it.
        nameless = [s.area is Area.SHMEM and s.file is None for s in lives.states]
        self._nameless = np.append(np.array(nameless, bool), False)
        rows = np.flatnonzero(held & self._nameless[run.state])
        key, _ = origins(lives, run.key[rows])
        order = np.lexsort((faults.time[rows], key))
        made, first = np.unique(key[order], return_index=True)
        self._made = dict(zip(made.tolist(), faults.time[rows][order][first].tolist(), strict=True))
        filled = np.array([f for space in run.spaces.values() for f in space.filled], np.int64).reshape(-1, 3)
        start, _ = origins(lives, filled[:, 0])
        self._filled = np.stack((start, start + filled[:, 1] - filled[:, 0], filled[:, 2]), axis=1)

    def mapped(self, rows: I64, until: I64) -> I64:
        """int64[rows]: ns of the last neighbour's read before `until` (ns, one for each of `rows`), which most likely
        mapped the page of the fault as well; -1 without."""
        run, out = self._run, np.full(len(rows), -1, np.int64)
        if not len(rows) or not len(self._mm):
            return out
        nameless = self._nameless[run.state[rows]].tolist()
        key, _ = origins(run.lives, run.key[rows])
        asked = zip(run.faults.mm[rows].tolist(), key.tolist(), until.tolist(), nameless, strict=True)
        for i, (mm, page, when, bare) in enumerate(asked):
            seen = self._one(mm, page, when)
            # Nor has it one where MADV_REMOVE has taken it, until somebody touches it again.
            while seen >= 0 and (gone := self._removed(int(rows[i]), seen)) >= 0:
                seen = self._one(mm, page, gone)
            if seen >= 0 and (not bare or self._there(page, seen)):
                out[i] = seen
        return out

    def _removed(self, row: int, seen: int) -> int:
        # ns at which MADV_REMOVE took the page of a fault out of its file before `seen`, and no fault came since; -1.
        # Who cuts a file by its descriptor also writes to it so, which is not recorded: that page is taken to be there.
        run = self._run
        state = run.lives.states[run.state[row]]
        if state.file is None or not run.removed_parts:
            return -1
        at = int(run.faults.addr[row]) + state.shift
        start, end, time, by_mapping = self._parts_of(state.file)
        cuts = np.flatnonzero((start <= at) & (at < end) & (time < seen))
        if not len(cuts) or not by_mapping[cuts[-1]]:
            return -1
        gone = int(time[cuts[-1]])
        return -1 if self._touched(state.file, at >> PAGE_SHIFT, gone, seen) else gone

    def _parts_of(self, file: tuple[str, int]) -> I64:
        if file not in self._parts:
            parts = self._run.removed_parts
            rows = [(part.start, part.end, *how) for part, *how in parts if part.file == file]
            self._parts[file] = np.array(rows, np.int64).reshape(-1, 4).T
        return self._parts[file]

    def _touched(self, file: tuple[str, int], page: int, after: int, until: int) -> bool:
        # Whether any fault was on that page of the file between two times (ns).
        run, states = self._run, self._run.lives.states
        if file not in self._touches:
            mine = np.array([s.file == file for s in states] + [False], bool)
            shift = np.array([s.shift for s in states] + [0], np.int64)
            rows = np.flatnonzero(mine[run.state] & ~run.faults.failed)
            where = (run.faults.addr[rows].astype(np.int64) + shift[run.state[rows]]) >> PAGE_SHIFT
            order = np.lexsort((run.faults.time[rows], where))
            self._touches[file] = (where[order], run.faults.time[rows][order])
        where, time = self._touches[file]
        low, high = np.searchsorted(where, [page, page + 1])
        return bool(np.any((time[low:high] > after) & (time[low:high] < until)))

    def _there(self, key: int, when: int) -> bool:
        if self._made.get(key, 1 << 62) < when:
            return True
        start, end, time = self._filled.T
        return bool(np.any((start <= key) & (key < end) & (time < when)))

    def _one(self, mm: int, key: int, until: int) -> int:
        parents = self._run.family.parent
        mapping = bisect.bisect_right(self._run.lives.key, key) - 1
        while True:
            a, b = np.searchsorted(self._mm, [mm, mm + 1])
            low, high = a + np.searchsorted(self._key[a:b], [key - WINDOW + 1, key + WINDOW])
            page = self._page[low:high] + key - self._key[low:high]
            within = (page >= self._low[low:high]) & (page < self._low[low:high] + WINDOW)
            # Keys of two mappings may follow one another.
            within &= self._mapping[low:high] == mapping
            before = self._time[low:high][within & (self._time[low:high] < until)]
            if len(before):
                return int(before.max())
            if mm not in parents or not self._copied.to(mm, key):
                return -1
            mm, until = parents[mm][0], min(until, parents[mm][1])
