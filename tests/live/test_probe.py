"""Every capability is tried, says why, and has a fix where it is missing."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pagelens.linux import probe
from pagelens.vm import CapabilityMissingError


def test_every_line_is_complete() -> None:
    for found in probe.capabilities():
        assert found.detail and found.unlocks, found
        assert bool(found.fix) is not found.works, found


def test_answers_agree_with_the_kernel() -> None:
    """Independent looks at some of what was tried."""
    assert probe.status("root").works is (os.geteuid() == 0)
    with open("/proc/self/pagemap", "rb") as file:
        page = id(probe) >> 12
        file.seek(page * 8)
        entry = struct.unpack("Q", file.read(8))[0]
    assert probe.status("pfn").works is (entry & ((1 << 55) - 1) != 0)
    assert probe.status("kcore").works is os.access("/proc/kcore", os.R_OK)


def test_require_names_the_fix() -> None:
    missing = [c for c in probe.capabilities() if not c.works]
    if not missing:
        pytest.skip("missing capability: none is missing here")
    with pytest.raises(CapabilityMissingError, match="fix: ") as caught:
        probe.require(missing[0].name, "this test")
    assert caught.value.exit_code == 3


def test_trials_leave_nothing() -> None:
    before = {p.name for p in Path("/proc/self/fd").iterdir()}
    probe.status.cache_clear()
    probe.capabilities()
    assert {p.name for p in Path("/proc/self/fd").iterdir()} == before
