"""Pre-copy forecast: with bandwidth B and pause budget P, does sending dirty pages round by round converge?

Round 0 sends everything; while it is on its way the program dirties D(T) distinct pages, T being the round's
time; round 1 sends those, and so on. D is measured, not assumed: the union of the dirty sets of k successive
epochs is one point of it, at k epochs' length. Between points D is interpolated in log-log; beyond them it
goes on with the slope of the nearest two. (Real curves bend down with time, so below the shortest interval
this forecasts too many pages rather than too few.)
Rejected: a constant dirty rate (hot pages are dirtied again and again: it forecasts no convergence for most
real programs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pagelens.dirty import spans
from pagelens.dirty.spans import Spans
from pagelens.vm.errors import UsageError
from pagelens.vm.units import PAGE_SIZE

MAX_ROUNDS = 30


@dataclass(frozen=True, slots=True)
class Curve:
    """Distinct pages dirtied within an interval: (seconds, pages), ascending. total: pages to send first."""

    points: tuple[tuple[float, float], ...]
    total: int

    def pages(self, seconds: float) -> float:
        """D(seconds)."""
        first, last = self.points[0], self.points[-1]
        if seconds <= first[0]:
            slope = _slope(first, self.points[1]) if len(self.points) > 1 else 0.0
            return float(first[1] * (max(seconds, 1e-9) / first[0]) ** slope)
        if seconds >= last[0]:
            if len(self.points) < 2:
                return min(float(self.total), last[1] * seconds / last[0])
            slope = _slope(self.points[-2], last)
            return float(min(self.total, last[1] * (seconds / last[0]) ** slope))
        for left, right in zip(self.points, self.points[1:], strict=False):
            if seconds <= right[0]:
                grown = left[1] * (seconds / left[0]) ** _slope(left, right)
                return float(grown if left[1] else right[1])
        return last[1]


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    if left[1] <= 0 or right[1] <= 0:
        return 0.0
    return min(1.0, max(0.0, math.log(right[1] / left[1]) / math.log(right[0] / left[0])))


def curve(dirty: Sequence[Spans], seconds: float, total: int) -> Curve:
    """D from the dirty sets of successive epochs of `seconds` each; total: pages with contents.

    The point at k epochs is the mean over all windows of k (k = 1, 2, 4, …). Raises UsageError for none."""
    if not dirty:
        raise UsageError("a forecast needs at least one epoch")
    points = []
    size = 1
    while size <= len(dirty):
        sums = []
        for at in range(0, len(dirty) - size + 1, size):
            union = spans.EMPTY
            for one in dirty[at : at + size]:
                union = spans.union(union, one)
            sums.append(union.pages)
        points.append((seconds * size, sum(sums) / len(sums)))
        size *= 2
    return Curve(tuple(points), total)


@dataclass(frozen=True, slots=True)
class Forecast:
    """rounds: (seconds, pages) sent while the program runs; downtime_s: the last transfer, with the program
    stopped; converges: whether it meets the pause budget; floor_s: the least downtime that more rounds reach.
    """

    rounds: tuple[tuple[float, int], ...]
    downtime_s: float
    converges: bool
    total_bytes: int
    floor_s: float

    def text(self) -> str:
        """One sentence."""
        verdict = "converges" if self.converges else "does not converge"
        return (
            f"pre-copy {verdict}: {len(self.rounds)} rounds, {self.total_bytes / 2**20:.1f} MiB sent, "
            f"downtime {self.downtime_s * 1e3:.2f} ms (floor {self.floor_s * 1e3:.2f} ms)"
        )


def forecast(measured: Curve, bandwidth: float, pause: float) -> Forecast:
    """bandwidth: bytes a second; pause: seconds that the program may stand still."""
    if bandwidth <= 0 or pause < 0:
        raise UsageError("bandwidth must be positive, and the pause not negative")
    rounds: list[tuple[float, int]] = []
    pages = float(measured.total)
    best = math.inf
    while True:
        seconds = pages * PAGE_SIZE / bandwidth
        best = min(best, seconds)
        if rounds and (seconds <= pause or len(rounds) >= MAX_ROUNDS):
            break
        following = measured.pages(seconds)
        rounds.append((seconds, round(pages)))
        if len(rounds) > 1 and following >= pages * 0.98:  # stands still: more rounds change nothing
            pages = following
            best = min(best, pages * PAGE_SIZE / bandwidth)
            break
        pages = following
    down = pages * PAGE_SIZE / bandwidth
    sent = sum(n for _, n in rounds) + round(pages)
    return Forecast(tuple(rounds), down, down <= pause, sent * PAGE_SIZE, best)
