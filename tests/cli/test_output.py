"""-o FILE: a file is replaced whole; what is no file is written to, never replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pagelens.cli.output import write_file
from pagelens.vm.errors import UsageError


def test_a_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_file(path, b"one", False)
    with pytest.raises(UsageError, match="--force"):
        write_file(path, b"two", False)
    write_file(path, b"two", True)
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("force", [False, True])
def test_a_pipe_stays_one(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(path, b"data", force)
        assert os.read(reader, 100) == b"data"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]
