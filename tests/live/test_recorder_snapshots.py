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


def test_cached_pages_of_mapped_files_are_recorded(tmp_path: Path) -> None:
    run = record(tmp_path, ["/bin/true"])
    assert_complete(run)
    exits = [row["snapshot"] for row in run.capture.table("snapshots").to_pylist() if row["moment"] == "exit"]
    files = [row for row in run.capture.table("file_pages").to_pylist() if row["snapshot"] == exits[0]]
    vmas = [row for row in run.capture.table("vmas").to_pylist() if row["snapshot"] == exits[0]]
    libc = next(v for v in vmas if "/libc" in v["name"] and "x" in v["perms"])
    cached = sum(f["count"] for f in files if (f["dev"], f["inode"]) == (libc["dev"], libc["inode"]))
    size = -(-Path(libc["name"]).stat().st_size // 4096)
    # What runs is cached; and each page counts once, though several vmas map the file.
    assert 0 < cached <= size
    assert {f["order"] for f in files} - {None} != set() or not Path("/proc/kpageflags").exists()
