"""`faults` and `query` over a recording of known faults: exact counts by function, line, vma, thread,
kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pagelens.report import faults as report
from support.captures import record
from support.cli import pagelens, refused, rows
from support.subjects import SOURCES, Subjects

LINE = next(
    i for i, t in enumerate((SOURCES / "placed_faults.c").read_text().splitlines(), 1) if "TOUCH LINE" in t
)
pytestmark = pytest.mark.requires("root", "bpf", "libbpf", "perf-system")


@pytest.fixture(scope="module")
def capture(subjects: Subjects, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("captures"), subjects("placed_faults"))


def test_by_function(capture: Path) -> None:
    found = rows("faults", "faults", capture, "--by", "function", "--top", 0)
    by = {r["function"]: r for r in found}
    assert (by["touch"]["faults"], by["touch"]["pages"], by["touch"]["kernel"]) == (2100, 2100, 0)
    # malloc of the thread's stack and descriptor aside, worker touches 4 x 300 pages.
    assert by["worker"]["faults"] == 1200
    total = sum(r["faults"] for r in found)
    assert sum(r["share"] for r in found) == pytest.approx(1.0)
    summary = json.loads(pagelens("summary", capture, "--format", "json").stdout)
    assert total == summary["faults"]["recorded"]


def test_by_line_and_stack(capture: Path) -> None:
    lines = {(r["line"], r["faults"]) for r in rows("faults", "faults", capture, "--by", "line", "--top", 0)}
    assert (f"placed_faults.c:{LINE}", 2100) in lines
    stacks = rows("faults", "faults", capture, "--by", "stack", "--top", 0)
    touch = [r for r in stacks if r["stack"].startswith(f"touch placed_faults.c:{LINE}")]
    assert sum(r["faults"] for r in touch) == 2100


def test_by_vma_knows_what_was_mapped_then(capture: Path) -> None:
    """The workers' mappings are gone at exit, and lay over one another: still four times 300."""
    found = rows("faults", "faults", capture, "--by", "vma", "--top", 0)
    workers = [(r["faults"], r["pages"]) for r in found if r["kind"] == "jit"]
    assert workers == [(300, 300)] * 4
    regions = {r["region"]: r for r in rows("faults", "faults", capture, "--by", "region", "--top", 0)}
    assert regions["generated code"]["faults"] == 1200
    assert regions["anonymous memory"]["faults"] >= 2100
    assert "placed_faults text" in regions


def test_by_thread_process_kind(capture: Path) -> None:
    threads = rows("faults", "faults", capture, "--by", "thread", "--top", 0)
    assert len(threads) == 6
    processes = rows("faults", "faults", capture, "--by", "process", "--top", 0)
    assert len(processes) == 2
    kinds = {r["kind"]: r["faults"] for r in rows("faults", "faults", capture, "--by", "kind", "--top", 0)}
    assert kinds["write, no page"] >= 3200
    assert 100 <= kinds["write, page present"] < 300


def test_query(capture: Path) -> None:
    (row,) = rows(
        "query", "query", capture, "select count(*) n, min(addr) addr from events where kind='fault'"
    )
    assert row["n"] > 3300 and row["addr"].startswith("0x")
    sql = "select name, args from events where name = 'mmap' and args[2] = 8192000"
    (mmap, *_) = rows("query", "query", capture, sql)
    assert mmap["args"][1:4] == ["0x7d0000", "0x3", "0x22"]
    assert "SQL" in refused(2, "query", capture, "selec 1")
    assert "one argument" in refused(2, "query", capture, "select", "1")
    assert pagelens("query", capture).stdout.count("events") > 20


def test_query_joins_what_why_concludes(capture: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.plens"
    shutil.copytree(capture, copy)
    sql = "select cause, count(*) n from events where kind='fault' and cause is not null group by cause"
    causes = {r["cause"]: r["n"] for r in json.loads(pagelens("query", copy, sql, "--format", "json").stdout)}
    assert causes["first-write"] >= 3200
    assert sum(n for cause, n in causes.items() if "fork" in cause) >= 100
    assert (copy / "derived/causes").is_dir()


def test_foreign_and_missing_captures(tmp_path: Path) -> None:
    for command in ("faults", "query"):
        assert "not a pagelens capture" in refused(5, command, tmp_path)
        assert "no capture at" in refused(2, command, tmp_path / "nothing")
        assert "needs a capture" in refused(2, command)


def test_error_codes() -> None:
    assert report.describe_error(6) == "write, no page"
    assert report.describe_error(0x15) == "exec, page present"
    assert report.describe_error(2, True, 59) == "write, no page, by the kernel in execve, major"
    assert report.describe_error(3, call=-1) == "write, page present, by the kernel"


def test_jit_code_keeps_its_names(subjects: Subjects, tmp_path: Path) -> None:
    capture = record(tmp_path, subjects("jit"))
    (kept,) = capture.glob("perf-*.map")
    Path(f"/tmp/{kept.name}").unlink()  # gone, as the process is
    by = {r["function"]: r["faults"] for r in rows("faults", "faults", capture, "--top", 0)}
    assert by["Jitted::touch"] == 64
