"""`map` of a capture: as recorded, at a moment, and each change."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagelens.capture.reader import Capture
from support.captures import record
from support.cli import refused, rows
from support.subjects import Subjects

pytestmark = pytest.mark.requires("root", "bpf", "libbpf", "perf-system")


@pytest.fixture(scope="module")
def capture(subjects: Subjects, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("captures"), subjects("placed_faults"))


def test_changes(capture: Path) -> None:
    found = rows("map-changes", "map", capture, "--changes", "--mm", 1)
    mapped = [r for r in found if "1228800, PROT_READ|PROT_WRITE|PROT_EXEC" in r["call"]]
    assert [(r["effect"], len(r["came"])) for r in mapped] == [("new", 1)] * 4
    assert sum(r["effect"] == "unmapped" and "1228800" in r["call"] for r in found) == 4
    guards = [r for r in found if r["call"].startswith("mprotect") and "8388608" in r["call"]]
    assert all("split" in r["effect"] for r in guards) and guards
    assert found == sorted(found, key=lambda r: (r["at"], r["event"]))


def test_at(capture: Path) -> None:
    changes = rows("map-changes", "map", capture, "--changes", "--mm", 1)
    worker = next(r for r in changes if "PROT_EXEC" in r["call"] and "1228800" in r["call"])
    (start, end) = worker["came"][0].split()[0].split("-")
    during = rows("map", "map", capture, "--at", f"#{worker['event']}")
    (there,) = [r for r in during if r["start"] == f"0x{start}"]
    assert (there["end"], there["perms"], there["kind"], there["rss"]) == (f"0x{end}", "rwxp", "jit", None)
    assert [r["kind"] for r in during if r["kind"] == "thread-stack"] == ["thread-stack"]
    at_exit = rows("map", "map", capture)
    assert not any(r["perms"] == "rwxp" for r in at_exit)
    # 2,000 pages of the parent, 100 of them copied by the child while shared: all still there at exit.
    assert any(r["size"] >= 2000 * 4096 and r["rss"] >= 2000 * 4096 for r in at_exit)
    assert len(rows("map", "map", capture, "--at", "exec")) < len(during) < 100


def test_wrong_moments(capture: Path) -> None:
    child = max(r["mm"] for r in Capture(capture).table("mms").to_pylist())
    assert "not a moment" in refused(2, "map", capture, "--at", "yesterday")
    assert "no event" in refused(2, "map", capture, "--at", "#999999")
    assert "it has: exec, exit" in refused(2, "map", capture, "--at", "detach")
    assert "came to be later" in refused(2, "map", capture, "--at", "0ns", "--mm", child)
    assert "no address space 77" in refused(2, "map", capture, "--changes", "--mm", 77)
    assert "need a capture" in refused(2, "map", 1, "--at", "3")
    assert "needs a process id or a capture" in refused(2, "map")


def test_pages_of_a_capture(capture: Path) -> None:
    counts = rows("pages-by-region", "pages", capture, "--by", "region")
    assert max(r["present"] for r in counts if r["kind"] == "anon") >= 2000
    assert sum(r["pages"] for r in rows("pages", "pages", capture, "--at", "exec")) < 20
    assert "snapshots only" in refused(2, "pages", capture, "--at", "20ms")
    assert "no snapshot" in refused(2, "pages", capture, "--mm", 99)


def test_without_snapshots(subjects: Subjects, tmp_path: Path) -> None:
    """What is left: calls, faults, and the names of what calls mapped; and one sentence for the rest."""
    capture = record(tmp_path, subjects("placed_faults"), options=("--snapshot", "none"))
    assert "no snapshot of mm 1" in refused(2, "map", capture)
    assert "needs two moments" in refused(2, "diff", capture)
    found = rows("faults", "faults", capture, "--by", "region", "--top", 0)
    assert next(r["faults"] for r in found if r["region"] == "generated code") == 1200
    assert any(r["region"] == "libc.so.6 text" for r in found)
