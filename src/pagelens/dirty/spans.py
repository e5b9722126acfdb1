"""Sorted address spans [start, end) as numpy columns, and their algebra.

Every backend answers with spans, and an epoch is set arithmetic on them: what is new is trackable minus
registered, what lost its content is before minus now. Rejected: bitmaps (a 1 TiB reservation costs 32 MiB
each) and Python sets of pages (a 1 GiB heap has 262,144).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT

U64 = npt.NDArray[np.uint64]
_TOP = np.uint64((1 << 64) - 1)


class Spans(NamedTuple):
    """start, end: uint64[n], bytes, ascending and disjoint."""

    start: U64
    end: U64

    @property
    def pages(self) -> int:
        """Pages in all spans."""
        return int((self.end - self.start).sum()) >> PAGE_SHIFT

    def __bool__(self) -> bool:
        return len(self.start) > 0

    def pairs(self) -> list[tuple[int, int]]:
        """[(start, end)] as Python integers."""
        return list(zip(self.start.tolist(), self.end.tolist(), strict=True))


EMPTY = Spans(np.empty(0, np.uint64), np.empty(0, np.uint64))


def of(pairs: Iterable[tuple[int, int]]) -> Spans:
    """From pairs in any order; overlapping and touching ones become one."""
    rows = np.array(sorted(pairs), dtype=np.uint64).reshape(-1, 2)
    return _merged(rows[:, 0].copy(), rows[:, 1].copy())


def joined(start: U64, end: U64) -> Spans:
    """Touching neighbours become one span; the input is ascending and disjoint."""
    if len(start) < 2:
        return Spans(start, end)
    gap = (start[1:] != end[:-1]).nonzero()[0]
    if len(gap) == len(start) - 1:
        return Spans(start, end)
    return Spans(np.concatenate((start[:1], start[gap + 1])), np.concatenate((end[gap], end[-1:])))


def pages(a: Spans) -> U64:
    """uint64[a.pages]: the address of each page."""
    count = ((a.end - a.start) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    run = np.repeat(np.arange(len(count)), count)
    within = np.arange(len(run)) - (np.cumsum(count) - count)[run]
    return np.asarray(a.start[run] + (within.astype(np.uint64) << np.uint64(PAGE_SHIFT)), np.uint64)


def inside(page: U64, where: Spans) -> npt.NDArray[np.bool_]:
    """Whether each address lies in `where`."""
    if not where:
        return np.zeros(len(page), bool)
    index = np.minimum(where.end.searchsorted(page, side="right"), len(where.end) - 1)
    return np.asarray((page >= where.start[index]) & (page < where.end[index]), bool)


def overlaps(a: Spans, b: Spans) -> tuple[Spans, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The common parts, in order, and for each the index of its span in `a` and in `b`."""
    none = np.empty(0, np.int64)
    if not a or not b:
        return EMPTY, none, none
    # Methods: numpy's functions of the same names cost as much again on spans as few as most are.
    low = b.end.searchsorted(a.start, side="right")
    count = b.start.searchsorted(a.end) - low
    total = int(count.sum())
    if not total:
        return EMPTY, none, none
    if total == len(count) and count.max() == 1:
        in_a, in_b = np.arange(total), low  # one part in each, as often: nothing to spread
        part = Spans(np.maximum(a.start, b.start[low]), np.minimum(a.end, b.end[low]))
        return part, in_a, in_b
    in_a = np.arange(len(count)).repeat(count)
    first = count.cumsum() - count
    in_b = np.arange(total) - first[in_a] + low[in_a]
    part = Spans(np.maximum(a.start[in_a], b.start[in_b]), np.minimum(a.end[in_a], b.end[in_b]))
    return part, in_a, in_b


def common(a: Spans, b: Spans) -> Spans:
    """What is in both."""
    return overlaps(a, b)[0]


def minus(a: Spans, b: Spans) -> Spans:
    """What is in `a` and not in `b`."""
    if not a or not b:
        return a
    if a is b:
        return EMPTY
    holes = Spans(
        np.concatenate((np.zeros(1, np.uint64), b.end)), np.concatenate((b.start, np.array([_TOP])))
    )
    keep = holes.start < holes.end
    return common(a, Spans(holes.start[keep], holes.end[keep]))


def union(a: Spans, b: Spans) -> Spans:
    """What is in either, joined (an operand is returned as it is where the other is empty)."""
    if not a:
        return b
    if not b:
        return a
    start = np.concatenate((a.start, b.start))
    order = np.argsort(start, kind="stable")
    return _merged(start[order], np.concatenate((a.end, b.end))[order])


def _merged(start: U64, end: U64) -> Spans:
    # Ascending by start, possibly overlapping: one span for each island.
    if not len(start):
        return EMPTY
    end = np.maximum.accumulate(end)
    gap = start[1:] > end[:-1]
    return Spans(start[np.concatenate(([True], gap))], end[np.concatenate((gap, [True]))])


def same(a: Spans, b: Spans) -> bool:
    """Whether both hold the same spans."""
    if a is b:
        return True
    return len(a.start) == len(b.start) and bool((a.start == b.start).all() and (a.end == b.end).all())
