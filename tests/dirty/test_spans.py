"""The span algebra against sets of pages, and what is built on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.dirty import forecast, heat, spans
from pagelens.dirty.epoch import Builder, Epoch, Why
from pagelens.dirty.spans import Spans
from pagelens.vm.errors import UsageError
from pagelens.vm.vma import Prot, Vma, VmaList

PAGE = 4096
pages = st.sets(st.integers(0, 60), max_size=40)


def _spans(numbers: set[int]) -> Spans:
    return spans.of((n * PAGE, (n + 1) * PAGE) for n in numbers)


def _pages(what: Spans) -> set[int]:
    out: set[int] = set()
    for start, end in what.pairs():
        piece = set(range(start // PAGE, end // PAGE))
        assert piece
        assert not piece & out
        out |= piece
    return out


@settings(deadline=None, max_examples=60)
@given(pages, pages)
def test_algebra_is_that_of_sets(a: set[int], b: set[int]) -> None:
    x, y = _spans(a), _spans(b)
    assert _pages(x) == a
    assert x.pages == len(a)
    assert _pages(spans.common(x, y)) == a & b
    assert _pages(spans.minus(x, y)) == a - b
    assert _pages(spans.union(x, y)) == a | b
    assert spans.same(x, y) == (a == b)
    joined = spans.union(x, y)
    assert (joined.start[1:] > joined.end[:-1]).all()  # touching neighbours are one span
    part, in_a, in_b = spans.overlaps(x, y)
    assert all(x.start[i] <= s < x.end[i] for s, i in zip(part.start, in_a, strict=True))
    assert all(y.start[i] <= s < y.end[i] for s, i in zip(part.start, in_b, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=12))
def test_overlapping_input_becomes_disjoint(pairs: list[tuple[int, int]]) -> None:
    want = {p for first, n in pairs for p in range(first, first + n)}
    assert _pages(spans.of((f * PAGE, (f + n) * PAGE) for f, n in pairs)) == want


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(pages, st.sampled_from(list(Why))), max_size=5))
def test_the_first_reason_stays(parts: list[tuple[set[int], Why]]) -> None:
    builder = Builder()
    want: dict[int, Why] = {}
    for numbers, why in parts:
        builder.add(_spans(numbers), why)
        want = dict.fromkeys(numbers, why) | want
    start, count, why_column = builder.columns()
    got = {
        s // PAGE + i: Why(w)
        for s, c, w in zip(start.tolist(), count.tolist(), why_column.tolist(), strict=True)
        for i in range(c)
    }
    assert got == want


def _epoch(numbers: set[int], number: int = 0) -> Epoch:
    builder = Builder()
    builder.add(_spans(numbers), Why.WRITTEN)
    start, count, why = builder.columns()
    vmas = VmaList([Vma(0, 64 * PAGE, Prot.READ | Prot.WRITE), Vma(64 * PAGE, 99 * PAGE, Prot.READ)])
    return Epoch(number, 10, 5, 1, "pagescan", start, count, why, vmas, 1, named={"x": (PAGE // 2, 3 * PAGE)})


def test_an_epoch_answers_for_names_regions_and_addresses() -> None:
    epoch = _epoch({0, 1, 7})
    assert epoch.of("x") == [(0, 2 * PAGE - PAGE // 2)]
    with pytest.raises(KeyError):
        epoch.of("y")
    assert epoch.ranges() == [(0, 2), (7 * PAGE, 1)]
    assert epoch.addresses().tolist() == [0, PAGE, 7 * PAGE]
    assert [(r.start, r.dirty_pages, r.pages) for r in epoch.regions()] == [(0, 3, 64)]
    assert epoch.by_reason() == {"written": 3}


def test_curve_is_the_union_of_windows() -> None:
    curve = forecast.curve([_spans({0, 1}), _spans({1, 2}), _spans({0, 1}), _spans({9})], 0.1, 100)
    assert curve.points == ((0.1, 1.75), (0.2, 3.0), (0.4, 4.0))
    assert curve.worst == ((0.1, 2.0), (0.2, 3.0), (0.4, 4.0))


def test_forecast_of_bursts_says_may_converge() -> None:
    # One epoch of ten dirties 500 pages, the others 10: the mean meets the pause, a burst does not.
    dirty = [_spans(set(range(500 if i == 5 else 10))) for i in range(10)]
    told = forecast.forecast(forecast.curve(dirty, 0.01, 10_000), 100 * PAGE / 0.01, 0.02)
    assert (told.converges, told.worst.converges, told.verdict) == (True, False, "may converge")
    assert told.worst.downtime_s > told.downtime_s
    assert "may converge" in told.text()
    # Quiet at first, busy then: a quiet moment may be enough. Each round costs a look too.
    busy = [_spans(set(range(10 if i < 5 else 500))) for i in range(10)]
    told = forecast.forecast(forecast.curve(busy, 0.01, 10_000), 100 * PAGE / 0.01, 0.02)
    assert (told.converges, told.best.converges, told.verdict) == (False, True, "may converge")
    varied = forecast.curve(dirty, 0.01, 10_000, [0.03, 0.001, 0.002, 0.002])
    told = forecast.forecast(varied, 100 * PAGE / 0.01, 0.02)
    assert (varied.of_best().round_s, varied.round_s, varied.of_worst().round_s) == (0.001, 0.002, 0.002)
    assert told.best.downtime_s <= told.downtime_s <= told.worst.downtime_s
    slow = forecast.forecast(forecast.curve(dirty, 0.01, 10_000, 0.03), 100 * PAGE / 0.01, 0.02)
    assert slow.verdict == "does not converge"


def test_forecast_converges_and_does_not() -> None:
    # A hot set of 100 pages, always dirty; nothing else: the floor is 100 pages whatever the rounds.
    curve = forecast.curve([_spans(set(range(60)))] * 4, 0.01, 10_000)
    told = forecast.forecast(curve, 60 * PAGE / 0.002, 0.003)
    assert told.converges
    assert told.downtime_s == pytest.approx(0.002)
    assert told.total_bytes == sum(n for _, n in told.rounds) * PAGE + 60 * PAGE
    told = forecast.forecast(curve, 60 * PAGE / 0.002, 0.001)
    assert not told.converges
    assert told.floor_s == pytest.approx(0.002)
    with pytest.raises(UsageError):
        forecast.forecast(curve, 0, 1)
    with pytest.raises(UsageError):
        forecast.curve([], 0.1, 1)


def test_heat_shows_where_and_when() -> None:
    epochs = [_epoch({0, 1, 2, 3}), _epoch({63})]
    lines = heat.table(epochs, rows=8)
    assert len(lines) == 8
    assert lines[0].split("|")[1] == "+ "  # half of the first eighth in the first epoch
    assert lines[-1].split("|")[1] == " :"
    assert heat.strip(_epoch(set(range(64))), 10) == "@" * 10
    assert heat.shade(0) == " "
    assert heat.shade(0.001) == "."
    assert heat.table([_epoch(set())]) == []


def test_shares_of_buckets_add_up() -> None:
    whole = _spans(set(range(64)))
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = set(rng.integers(0, 64, 20).tolist())
        share = heat._shares(whole, _spans(chosen), 7)
        assert float(share.sum()) * 64 / 7 == pytest.approx(len(chosen))
