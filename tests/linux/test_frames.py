"""kpagecount and kpageflags of many frames at once, against one read a frame."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from pagelens.linux import frames
from pagelens.vm import CapabilityMissingError


def one(name: str, pfn: int) -> int | None:
    with open(f"/proc/{name}", "rb", buffering=0) as file:
        file.seek(pfn * 8)
        data = file.read(8)
    return struct.unpack("Q", data)[0] if len(data) == 8 else None


@pytest.mark.requires("kpageflags")
def test_bulk_agrees_with_single_reads() -> None:
    """Reserved low frames do not change: near and far ones, twice the same, unknown and beyond the end."""
    beyond = 1 << 40
    wanted = [1, 2, 3, 40, 41, 200, 3, 1, 0, beyond, beyond + 5]
    values, known = frames.lookup("kpageflags", np.array(wanted, np.uint64))
    assert known.tolist() == [True] * 8 + [False] * 3
    assert values.tolist() == [one("kpageflags", pfn) for pfn in wanted[:8]] + [0, 0, 0]
    nothing, none = frames.lookup("kpageflags", np.empty(0, np.uint64))
    assert len(nothing) == len(none) == 0


def test_a_file_that_is_not_there() -> None:
    assert not Path("/proc/kpagenonsense").exists()
    with pytest.raises(CapabilityMissingError, match="kpagenonsense"):
        frames.lookup("kpagenonsense", np.array([1], np.uint64))
