"""The Python API is the same objects as the command line's."""

from __future__ import annotations

import os

import pytest

import pagelens
from pagelens.linux import snapshot


def test_snapshot() -> None:
    shot = pagelens.snapshot(os.getpid(), pages=False)
    assert pagelens.snapshot is snapshot.take
    assert any(v.name == "[heap]" for v in shot.vmas)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pagelens.nonsense  # noqa: B018 (the access is the test)
