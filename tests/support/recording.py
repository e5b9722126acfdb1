"""Run `pagelens run` as a user would, and read its summary and capture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pagelens.capture.reader import Capture

SRC = Path(__file__).parents[2] / "src"


@dataclass
class Run:
    """returncode, stdout, stderr as of subprocess.run; summary: the JSON; path: of the capture."""

    returncode: int
    stdout: str
    stderr: str
    summary: dict[str, Any]
    path: Path

    @property
    def faults(self) -> dict[str, int]:
        """The figures of the completeness equation."""
        return self.summary["faults"]  # type: ignore[no-any-return]

    @property
    def capture(self) -> Capture:
        """The capture."""
        return Capture(self.path)

    def rows(self, where: str) -> list[dict[str, Any]]:
        """Events that a SQL condition selects, in order of time."""
        import duckdb

        events = self.capture.events()
        with duckdb.connect() as connection:
            connection.register("events", events)
            found = connection.sql(f"select * from events where {where} order by time_ns, seq")
            return found.to_arrow_table().to_pylist()

    def mapped(self, address: int) -> int:
        """ns at which mmap last gave `address`: before, something else may have been there."""
        when: int = self.rows(f"kind = 'syscall' and name = 'mmap' and result = {address}")[-1]["time_ns"]
        return when


def pagelens(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "PAGELENS_TRACEBACK": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pagelens.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=100,
        env=env,
        **options,
    )


def record(directory: Path, command: Sequence[str | Path], *args: str, **options: Any) -> Run:
    """`pagelens run ARGS -- COMMAND` with a capture in `directory`."""
    path = directory / "c.plens"
    summary = directory / "summary.json"
    done = pagelens(
        "run",
        "-c",
        str(path),
        "--force",
        "--summary-json",
        str(summary),
        *args,
        "--",
        *map(str, command),
        **options,
    )
    data = json.loads(summary.read_text()) if summary.exists() else {}
    return Run(done.returncode, done.stdout, done.stderr, data, path)


def assert_complete(run: Run) -> None:
    """The equation, from the summary and once more from the tables, thread by thread."""
    faults = run.faults
    assert faults["lost"] == 0, run.stderr
    assert faults["unexplained"] == 0, run.stderr
    assert faults["recorded"] + faults["gup"] == faults["counted_minor"] + faults["counted_major"]
    assert run.summary["complete"] and run.summary["status"] == "complete"
    tasks = run.capture.table("tasks").to_pylist()
    assert tasks and all(t["unexplained"] == 0 and t["lost"] == 0 for t in tasks)
    assert sum(t["recorded"] for t in tasks) == faults["recorded"]
    # Columns: a hundred thousand rows as objects take half a minute in an emulated machine.
    events = run.capture.table("events", ["kind", "failed", "tid"])
    completed = pc.and_(
        pc.equal(events.column("kind"), "fault"), pc.invert(pc.fill_null(events.column("failed"), False))
    )
    counts = pc.value_counts(events.column("tid").filter(completed))
    per_thread = {row["values"]: row["counts"] for row in counts.to_pylist()}
    counted: dict[int, int] = {}
    for t in tasks:
        counted[t["tid"]] = counted.get(t["tid"], 0) + t["recorded"]
    assert per_thread == {tid: n for tid, n in counted.items() if n}
