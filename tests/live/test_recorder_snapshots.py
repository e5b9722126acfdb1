"""The snapshots that a recording takes: at exec, and at the exit stop of the last task of an address space."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.recording import assert_complete, record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native", "ptrace")


def test_the_last_thread_need_not_be_the_leader(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("leader_first")])
    assert_complete(run)
    base = int(run.stdout, 16)
    assert "snapshot" not in run.stderr.partition("note")[2]
    shots = {row["moment"]: row for row in run.capture.table("snapshots").to_pylist()}
    assert set(shots) == {"exec", "exit"}
    assert shots["exit"]["mm"] == shots["exec"]["mm"]
    # A run of equal pages may reach beyond the range, on either side: only what lies inside counts.
    end = base + 10 * 4096
    present = sum(
        (min(row["start"] + row["count"] * 4096, end) - max(row["start"], base)) // 4096
        for row in run.capture.table("pages").to_pylist()
        if row["snapshot"] == shots["exit"]["snapshot"]
        and row["start"] < end
        and row["start"] + row["count"] * 4096 > base
    )
    assert present == 10
