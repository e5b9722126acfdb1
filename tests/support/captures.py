"""Captures of subject programs, recorded on this kernel once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli import pagelens


def record(directory: Path, *command: object, options: tuple[str, ...] = ()) -> Path:
    """Record `command` into a new capture; skips where this kernel or user cannot record."""
    capture = directory / f"{Path(str(command[0])).name}.plens"
    done = pagelens("run", "-c", capture, *options, "--", *command)
    if done.returncode == 125:
        pytest.skip(f"missing capability: recording ({done.stderr.strip()[:200]})")
    assert done.returncode == 0, done.stderr
    return capture
