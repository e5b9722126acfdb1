"""`run --detail full`: call stacks of a program that was compiled without frame pointers."""

from __future__ import annotations

import json
import shutil
import subprocess
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


def _python() -> str:
    # A CPython that can name its functions.
    found = [shutil.which(f"python3.{minor}") for minor in range(12, 20)]
    found += [str(path) for path in sorted((Path.home() / ".pyenv/versions").glob("3.1[2-9].*/bin/python3"))]
    for name in filter(None, found):
        probe = "import sys; sys.activate_stack_trampoline('perf')"
        if not subprocess.run([name, "-c", probe], capture_output=True).returncode:
            return str(name)
    pytest.skip("missing tool: python 3.12 or later with its perf support")


@pytest.mark.requires("libdw", "ptrace")
def test_python_functions_where_the_interpreter_names_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import mmap\n"
        "m = mmap.mmap(-1, 900 << 12)\n"
        "def first():\n"
        "    for i in range(300): m[i << 12] = 1\n"
        "def second():\n"
        "    for i in range(300, 900): m[i << 12] = 1\n"
        "def both():\n"
        "    first(); second()\n"
        "both()\n"
    )
    run = record(tmp_path, [_python(), "-X", "perf", program], "--detail", "full")
    assert_complete(run)
    done = pagelens("faults", run.path, "--by", "python", "--top", 0, "--format", "json")
    rows = {(row["python"], row["file"]): row["faults"] for row in json.loads(done.stdout)}
    assert 300 <= rows[("first", str(program))] < 320
    assert 600 <= rows[("second", str(program))] < 620
    assert sum(rows.values()) == run.faults["recorded"]
    table = pagelens("faults", run.path, "--by", "python")
    named = sum(n for (_, file), n in rows.items() if file)
    assert f"{named:,} of {run.faults['recorded']:,} faults" in table.stdout + table.stderr

    # An interpreter that names nothing: by its C functions, and the share says so.
    run = record(tmp_path, [_python(), program], "--detail", "full")
    done = pagelens("faults", run.path, "--by", "python")
    assert "(0.0 %) with a Python function" in done.stdout + done.stderr
