"""Pre-copy forecast: with bandwidth B and pause budget P, does sending dirty pages round by round converge?

Round 0 sends everything; while it is on its way the program dirties D(T) distinct pages, T being the round's
time; round 1 sends those, and so on. D is measured, not assumed: the union of the dirty sets of k successive
epochs is one point of it, at the time that those epochs took. Between points D is interpolated in log-log;
beyond them it goes on with the slope of the nearest two. (Real curves bend down with time, so below the
shortest interval this forecasts too many pages rather than too few.)

Three curves make a band: the best, the mean and the worst over all windows of k epochs. A program works in
bursts, and a pre-copy ends with one window, not with the mean of them: what holds for the worst is said without
reserve, what holds for the others only is said as "may". A round costs what a look costs, besides its pages.
Rejected: a constant dirty rate (hot pages are dirtied again and again: it forecasts no convergence for most
real programs); the mean curve alone (it promised 3 rounds where an actual pre-copy took 15).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pagelens.dirty import spans
from pagelens.dirty.spans import Spans
from pagelens.vm.errors import UsageError
from pagelens.vm.units import PAGE_SIZE

MAX_ROUNDS = 30


@dataclass(frozen=True, slots=True)
class Curve:
    """Distinct pages dirtied within an interval: (seconds, pages), ascending. total: pages to send first.
    worst, best: the same of that window measured; empty: as `points`. round_s (and round_worst_s, round_best_s):
    what each round costs besides its pages (a look)."""

    points: tuple[tuple[float, float], ...]
    total: int
    worst: tuple[tuple[float, float], ...] = ()
    best: tuple[tuple[float, float], ...] = ()
    round_s: float = 0.0
    round_worst_s: float = 0.0
    round_best_s: float = 0.0

    def of_worst(self) -> Curve:
        """The curve of the worst windows."""
        return replace(self, points=self.worst or self.points, round_s=self.round_worst_s)

    def of_best(self) -> Curve:
        """The curve of the best windows."""
        return replace(self, points=self.best or self.points, round_s=self.round_best_s)

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


def curve(
    dirty: Sequence[Spans],
    seconds: float | Sequence[float],
    total: int,
    round_s: float | Sequence[float] = 0.0,
) -> Curve:
    """D from the dirty sets of successive epochs of `seconds` each (one number, or each epoch's own); total:
    pages with contents; round_s: what a look costs, or what each of them did (on a busy machine that varies as much
    as the pages do: the median goes with the mean, the ends of the middle four fifths with the worst and the best).

    The point at k epochs is the mean, and the worst, over all windows of k (k = 1, 2, 4, …). Raises UsageError
    for none."""
    if not dirty:
        raise UsageError("a forecast needs at least one epoch")
    length = [seconds] * len(dirty) if isinstance(seconds, float | int) else list(seconds)
    mean, worst, best = [], [], []
    size = 1
    while size <= len(dirty):
        sums, spent = [], []
        for at in range(0, len(dirty) - size + 1, size):
            union = spans.EMPTY
            for one in dirty[at : at + size]:
                union = spans.union(union, one)
            sums.append(union.pages)
            spent.append(sum(length[at : at + size]))
        took = sum(spent) / len(spent)
        mean.append((took, sum(sums) / len(sums)))
        # At the rate of the worst window, so that one that merely took longer is not the worst for that.
        rated = [n * min(1.0, took / t) for n, t in zip(sums, spent, strict=True)]
        worst.append((took, max(rated)))
        best.append((took, min(rated)))
        size *= 2
    highest = [max(n for _, n in worst[: i + 1]) for i in range(len(worst))]  # never falls: it is a union
    bad = tuple((took, max(n, high)) for (took, n), high in zip(worst, highest, strict=True))
    cost = sorted([round_s] if isinstance(round_s, float | int) else round_s)
    median, high, low = (cost[int((len(cost) - 1) * share)] for share in (0.5, 0.9, 0.1))
    return Curve(tuple(mean), total, bad, tuple(best), median, high, low)


@dataclass(frozen=True, slots=True)
class Course:
    """rounds: (seconds, pages) sent while the program runs; downtime_s: the last transfer, with the program
    stopped; converges: whether that meets the pause budget; floor_s: the least downtime that more rounds reach.
    """

    rounds: tuple[tuple[float, int], ...]
    downtime_s: float
    converges: bool
    total_bytes: int
    floor_s: float


@dataclass(frozen=True, slots=True)
class Forecast(Course):
    """The course by the mean curve, and by those of the worst and the best windows. unmeasured: rounds of the
    mean and the worst that are shorter than the shortest interval measured (their pages are an upper estimate)."""

    worst: Course
    best: Course
    unmeasured: int

    @property
    def verdict(self) -> str:
        """One of "converges" (by the worst windows too), "may converge" (by the mean, or by the best: a pre-copy
        ends with the first round that is short enough) and "does not converge"."""
        if self.worst.converges:
            return "converges"
        return "may converge" if self.converges or self.best.converges else "does not converge"

    def text(self) -> str:
        """One sentence."""
        courses = (self.best, self, self.worst)
        sent = _band([c.total_bytes / 2**20 for c in courses], ".1f")
        down = _band([c.downtime_s * 1e3 for c in courses], ".2f")
        floor = _band([c.floor_s * 1e3 for c in courses], ".2f")
        rounds = _band([len(c.rounds) for c in courses], "d")
        text = (
            f"pre-copy {self.verdict}: {rounds} round{'' if rounds == '1' else 's'}, {sent} MiB sent,"
            f" downtime {down} ms (floor {floor} ms); over the windows measured"
        )
        if self.unmeasured:
            text += (
                "; rounds shorter than the epochs are estimated from above (a shorter --interval measures)"
            )
        return text


def _band(values: Sequence[float], form: str) -> str:
    first, last = format(min(values), form), format(max(values), form)
    return first if first == last else f"{first} to {last}"


def forecast(measured: Curve, bandwidth: float, pause: float) -> Forecast:
    """bandwidth: bytes a second; pause: seconds that the program may stand still."""
    if bandwidth <= 0 or pause < 0:
        raise UsageError("bandwidth must be positive, and the pause not negative")
    expected = _course(measured, bandwidth, pause)
    worst = _course(measured.of_worst(), bandwidth, pause)
    best = _course(measured.of_best(), bandwidth, pause)
    shortest = measured.points[0][0]
    unmeasured = sum(s < shortest * 0.9 for course in (expected, worst) for s, _ in course.rounds)
    return Forecast(
        expected.rounds, expected.downtime_s, expected.converges, expected.total_bytes, expected.floor_s,
        worst, best, unmeasured,
    )  # fmt: skip


def _course(measured: Curve, bandwidth: float, pause: float) -> Course:
    rounds: list[tuple[float, int]] = []
    pages = float(measured.total)
    best = math.inf
    while True:
        down = pages * PAGE_SIZE / bandwidth + measured.round_s
        best = min(best, down)
        if rounds and (down <= pause or len(rounds) >= MAX_ROUNDS):
            break
        following = measured.pages(down)
        rounds.append((down, round(pages)))
        if len(rounds) > 1 and following >= pages * 0.98:  # stands still: more rounds change nothing
            pages = following
            down = pages * PAGE_SIZE / bandwidth + measured.round_s
            best = min(best, down)
            break
        pages = following
    sent = sum(n for _, n in rounds) + round(pages)
    return Course(tuple(rounds), down, down <= pause, sent * PAGE_SIZE, best)


def as_dict(measured: Curve, made: Forecast) -> dict[str, Any]:
    """The JSON object of a forecast (docs/schemas/dirty-forecast.json)."""

    def course(one: Course) -> dict[str, Any]:
        return {
            "converges": one.converges,
            "rounds": [{"seconds": s, "pages": n} for s, n in one.rounds],
            "downtime_s": one.downtime_s,
            "floor_s": one.floor_s,
            "bytes": one.total_bytes,
        }

    return course(made) | {
        "worst": course(made.worst),
        "best": course(made.best),
        "verdict": made.verdict,
        "unmeasured_rounds": made.unmeasured,
        "curve": [
            {"seconds": s, "pages": n, "worst": w}
            for (s, n), (_, w) in zip(measured.points, measured.worst or measured.points, strict=True)
        ],
        "text": made.text(),
    }
