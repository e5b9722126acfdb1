"""Pages that no fault of their own had mapped: fault-around, and what fork copies.

A read fault on a file or on shared memory maps its neighbours too, those of the 16 pages around it that the page cache
has (do_fault_around, filemap_map_pages, mm/filemap.c). No event says so. It matters once: where advice or a hole has
taken such a page away, the fault that brings it back is not the first use of it (see `taken`).

fork leaves out the page tables of a private mapping that nobody has written to (vma_needs_copy: no anon_vma). What a
parent had read of it, the child has not.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Area, Origin
from pagelens.why.lives import DROP_LINK, FORK_LINK, UNSEEN_KEY, Lives
from pagelens.why.replay import EDGE, IN_FLIGHT, Replayed, state_column
from pagelens.why.windows import AROUND, WINDOW

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]


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
        calls = np.array([o for space in run.spaces.values() for o in space.owned], np.int64).reshape(-1, 3)
        if len(calls):
            key, time = np.append(key, calls[:, 0]), np.append(time, calls[:, 2])
            order = np.argsort(key, kind="stable")
            key, time = key[order], time[order]
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

    def unsure(self, key: I64, life: I64) -> Bool:
        """bool[key]: of what `into` denies. A neighbour's vma may have become one with the page's, which then has its
        anon_vma; what mremap left behind or added may be of a vma that has one."""
        origin = np.array(self._lives.origin or [0], np.int64)
        joined = np.array(sorted(self._lives.joined), np.int64)
        _, mapping = origins(self._lives, key)
        return np.asarray(np.isin(life, joined) | (origin[mapping] == Origin.MREMAP))

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


class Around:
    """What reads of files and of shared memory have mapped around their pages."""

    def __init__(self, run: Replayed, life: I64) -> None:
        """life: of each fault, index into the lives (-1 none)."""
        faults = run.faults
        area = state_column(run.lives, run.state, "area", int(Area.UNMAPPED))
        held = np.isin(area, AROUND) & ~faults.failed & (life >= 0) & ((run.flags & (EDGE | IN_FLIGHT)) == 0)
        rows = np.flatnonzero(held & (faults.error >= 0) & ((faults.error & 3) == 0))
        low = run.key[rows] - ((faults.addr[rows] >> np.uint64(PAGE_SHIFT)).astype(np.int64) & (WINDOW - 1))
        more = np.array([r for s in run.spaces.values() for r in s.around], np.int64).reshape(-1, 4)
        start = np.append(low, more[:, 0])
        order = np.argsort(start, kind="stable")
        self._start = start[order]
        self._end = np.append(low + WINDOW, more[:, 1])[order]
        self._time = np.append(faults.time[rows], more[:, 2])[order]
        self._sure = np.append(np.ones(len(rows), bool), more[:, 3] != 0)[order]

    def of(self, key: int) -> list[tuple[int, bool]]:
        """(ns, whether surely, as far as vmas decide) of each read around the page."""
        low, high = np.searchsorted(self._start, [key - 2 * WINDOW, key + 1])
        hit = np.flatnonzero(self._end[low:high] > key) + low
        return list(zip(self._time[hit].tolist(), self._sure[hit].tolist(), strict=True))
