"""`run --detail full`: call stacks of a program that was compiled without frame pointers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import pagelens
from support.recording import assert_complete, record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")
FLAGS = ("-O2", "-fomit-frame-pointer", "-no-pie")


def chains(path: Path) -> list[list[str]]:
    done = pagelens("faults", path, "--by", "stack", "--top", 0, "--depth", 20, "--format", "json")
    assert done.returncode == 0, done.stderr
    return [[f.split(" ")[0] for f in row["stack"].split(" < ")] for row in json.loads(done.stdout)]


@pytest.mark.requires("libdw", "ptrace")
def test_full_gives_the_whole_chain(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("deep", *FLAGS)], "--detail", "full")
    assert_complete(run)
    mine = [chain for chain in chains(run.path) if chain[0] == "inner"]
    assert len(mine) == 1, "one fault is taken in inner()"
    assert mine[0][:4] == ["inner", "middle", "outer", "main"]
    assert mine[0][-1] == "_start"
    unwound = run.capture.meta["unwound"]
    assert unwound["stacks"] == run.capture.table("stacks").num_rows - sum(
        row["complete"] is None for row in run.capture.table("stacks").to_pylist()
    )
    assert not (run.path / "raw_stacks").exists()


def test_normal_knows_at_least_the_function(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("deep", *FLAGS)])
    assert_complete(run)
    assert len([chain for chain in chains(run.path) if chain[0] == "inner"]) == 1
