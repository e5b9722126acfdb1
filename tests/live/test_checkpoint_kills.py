"""SIGKILL of pagelens at random moments: no target is harmed, but by a rollback between its first change and its last.

200 of each: tools/checkpoint_kills.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support import kills
from support.subjects import Subjects


def test_killed_checkpoints_harm_nobody(subjects: Subjects, tmp_path: Path) -> None:
    seen = kills.of_checkpoints(8, subjects, tmp_path, random.Random(3))
    assert seen["verified"] > 0
    assert seen["whole after"]


def test_killed_rollbacks_harm_nobody_outside_their_changes(subjects: Subjects, tmp_path: Path) -> None:
    seen = kills.of_rollbacks(12, subjects, tmp_path, random.Random(4))
    assert seen["before"] + seen["between"] + seen["after"] == 12
    assert seen["before"] > 0


@pytest.mark.requires("uffd-wp-async")
def test_killed_fast_rollbacks_leave_nothing_in_the_target(subjects: Subjects, tmp_path: Path) -> None:
    kills.of_rollbacks(8, subjects, tmp_path, random.Random(5), fast=True)
