"""summary, its JSON, recover, and captures that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from support.recording import Run, pagelens, record
from support.subjects import Subjects

ROOT = Path(__file__).parents[2]
needs_bpf = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, subjects: Subjects) -> Run:
    return record(tmp_path_factory.mktemp("summary"), [subjects("toucher"), "500"])


@needs_bpf
def test_json_of_run_and_of_summary(run: Run) -> None:
    schema = json.loads((ROOT / "docs/schemas/summary.json").read_text())
    jsonschema.validate(run.summary, schema)
    done = pagelens("summary", str(run.path), "--format", "json")
    printed = json.loads(done.stdout)
    jsonschema.validate(printed, schema)
    assert printed["faults"] == run.faults
    assert sum(c["faults"] for c in printed["causes"]) >= run.faults["recorded"]


@needs_bpf
def test_table(run: Run) -> None:
    done = pagelens("summary", "-c", str(run.path))
    assert done.returncode == 0
    assert f"{run.faults['recorded']:,} recorded" in done.stdout
    assert "unexplained 0" in done.stdout


@needs_bpf
def test_the_second_summary_reads_no_events(run: Run, tmp_path: Path) -> None:
    # Kept with the state of the parts: the same words without a table, and worthless once a part differs.
    import shutil

    path = tmp_path / "copy.plens"
    shutil.copytree(run.path, path)
    shutil.rmtree(path / "derived", ignore_errors=True)
    first = pagelens("summary", str(path))
    again = pagelens("summary", str(path))
    assert first.returncode == 0 and again.stdout == first.stdout
    script = (
        "import sys; from pagelens.cli.main import main; code = main(['summary', sys.argv[1]]);"
        " print(sorted({m.partition('.')[0] for m in sys.modules} & {'numpy', 'pyarrow', 'duckdb', 'rich'}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert loaded.stdout == first.stdout + "[]\n"
    part = sorted((path / "events").glob("part-*.parquet"))[-1]
    whole = part.read_bytes()
    at = len(whole) // 3
    part.write_bytes(whole[:at])
    assert pagelens("summary", str(path)).returncode == 5
    part.write_bytes(whole)
    assert pagelens("summary", str(path)).stdout == first.stdout
    part.unlink()  # as ring-buffer mode does with the oldest
    assert pagelens("summary", str(path)).stdout != first.stdout


@needs_bpf
def test_a_capture_whose_recorder_was_killed(run: Run, tmp_path: Path) -> None:
    # As a kill leaves it: meta.json says "recording", and there is a spool with a row that was cut off.
    import shutil

    path = tmp_path / "killed.plens"
    shutil.copytree(run.path, path)
    meta = json.loads((path / "meta.json").read_text())
    meta["status"] = "recording"
    del meta["summary"]
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "spool").mkdir()
    (path / "spool" / "00000007.faults").write_bytes(bytes(64) + b"cut off")
    for suffix in ("calls", "switches", "stacks", "text"):
        (path / "spool" / f"00000007.{suffix}").touch()
    before = pagelens("summary", str(path))
    assert before.returncode == 0 and "pagelens recover" in before.stdout
    done = pagelens("recover", str(path), "--format", "json")
    assert json.loads(done.stdout) == {"segments": 1, "rows": 1, "truncated_bytes": 7}
    after = json.loads(pagelens("summary", str(path), "--format", "json").stdout)
    assert after["status"] == "recovered" and after["faults"]["unexplained"] is None
    assert not (path / "spool").exists()
    again = pagelens("recover", str(path), "--format", "json")
    assert json.loads(again.stdout) == {"segments": 0, "rows": 0, "truncated_bytes": 0}


def test_captures_that_are_none(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "meta.json").write_text("{not json")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "meta.json").write_text('{"format": "pagelens capture", "schema_version": 99}')
    plain = tmp_path / "file"
    plain.write_text("x")
    for path, code, text in (
        (tmp_path / "absent", 2, "no capture at"),
        (foreign, 5, "is not a pagelens capture"),
        (plain, 5, "is not a pagelens capture"),
        (damaged, 5, "damaged"),
        (newer, 5, "newer pagelens"),
    ):
        for command in ("summary", "recover"):
            done = pagelens(command, str(path))
            assert (done.returncode, done.stdout) == (code, ""), (command, path, done.stderr)
            assert text in done.stderr and done.stderr.count("\n") == 1


@needs_bpf
def test_a_damaged_part(run: Run, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "c.plens"
    shutil.copytree(run.path, path)
    part = next((path / "events").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:1000])
    done = pagelens("summary", str(path))
    assert done.returncode == 5
    assert "damaged" in done.stderr and done.stderr.count("\n") == 1
