"""Frames at forks are read within a budget, and what is left out is counted."""

from __future__ import annotations

import os

import pytest

from pagelens.capture import forkframes
from pagelens.capture.forkframes import ForkFrames
from pagelens.vm.pages import PageState

pytestmark = pytest.mark.requires("pfn")


def test_within_the_budget_all_are_read() -> None:
    frames = ForkFrames()
    found = frames.take(os.getpid())
    assert found is not None
    began, ended, runs = found
    assert began < ended and runs.pfn is not None and runs.pfn.all()
    assert not (runs.states() & int(PageState.FILE | PageState.ZERO)).any()
    assert (frames.forks, frames.read, frames.pages, frames.note()) == (1, 1, runs.pages, "")


def test_beyond_it_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkframes, "FREE_NS", 0)
    monkeypatch.setattr(forkframes, "PART", 1 << 62)
    frames = ForkFrames()
    assert frames.take(os.getpid()) is not None
    assert frames.take(os.getpid()) is None and frames.take(os.getpid()) is None
    assert frames.note().startswith("2 of 3 forks without a look at frames")


def test_a_large_process_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkframes, "MOST", 10)
    frames = ForkFrames()
    assert frames.take(os.getpid()) is None
    assert (frames.read, frames.hidden) == (0, False)
