"""What counts as a failure: of a test, of a guest, of a skip that nobody allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmtest.errors import VmtestError
from vmtest.fetch import Kernel, kernel
from vmtest.matrix import judge
from vmtest.skips import Allowed, load
from vmtest.verdict import End, Verdict

KERNEL = Kernel("6.1", "6.1.0-1-cloud-amd64", Path("/nowhere"), None, None)
ALLOWED = [Allowed(("6.1",), "tests/live/*", "pagemap-scan", "6.7 brought it")]


def _end(code: int | None, end: End = End.EXITED) -> Verdict:
    return Verdict(end, code, "why", 5.0, 50.0, "last words")


def _judge(
    tmp_path: Path, verdict: Verdict, *tests: tuple[str, str, str]
) -> tuple[dict[str, int], list[str]]:
    lines = [json.dumps({"test": t, "outcome": o, "why": w, "s": 0}) for t, o, w in tests]
    (tmp_path / "tests.jsonl").write_text("".join(f"{line}\n" for line in lines))
    outcome = judge(KERNEL, verdict, tmp_path, ALLOWED)
    return dict(outcome.counts), outcome.complaints


def test_all_passed(tmp_path: Path) -> None:
    counts, complaints = _judge(tmp_path, _end(0), ("tests/live/a.py::x", "passed", ""))
    assert (counts, complaints) == ({"passed": 1}, [])


def test_allowed_skip_is_a_skip(tmp_path: Path) -> None:
    skip = ("tests/live/a.py::x", "skipped", "Skipped: missing capability: pagemap-scan (ENOTTY)")
    counts, complaints = _judge(tmp_path, _end(0), ("tests/live/a.py::y", "passed", ""), skip)
    assert (counts, complaints) == ({"passed": 1, "skipped": 1}, [])


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("tests/live/a.py::x", "Skipped: missing capability: kcore (EPERM)"),
        ("tests/kernels/a.py::x", "Skipped: missing capability: pagemap-scan (ENOTTY)"),
    ],
)
def test_unlisted_skip_is_a_failure(tmp_path: Path, test: str, why: str) -> None:
    counts, complaints = _judge(tmp_path, _end(0), (test, "skipped", why))
    assert counts == {"failed": 1}
    assert "allowed_skips.toml does not list it" in complaints[0]


def test_what_was_not_run_failed(tmp_path: Path) -> None:
    counts, _ = _judge(tmp_path, _end(0), ("a", "passed", ""), ("b", "not run", "time budget of 300 s"))
    assert counts == {"passed": 1, "failed": 1}


@pytest.mark.parametrize("end", [End.PANIC, End.OOM, End.HANG, End.TIMEOUT, End.NO_BOOT, End.LOST])
def test_a_guest_that_failed_counts_even_when_all_its_tests_passed(tmp_path: Path, end: End) -> None:
    counts, complaints = _judge(tmp_path, _end(None, end), ("a", "passed", ""))
    assert counts == {"passed": 1, "failed": 1}
    assert end.value in complaints[0]
    assert "last words" in complaints[0]


@pytest.mark.parametrize("code", [2, 3, 4])
def test_pytest_that_broke_off_is_a_failure(tmp_path: Path, code: int) -> None:
    counts, _ = _judge(tmp_path, _end(code), ("a", "passed", ""))
    assert counts["failed"] == 1


def test_no_test_at_all_is_a_failure(tmp_path: Path) -> None:
    counts, _ = _judge(tmp_path, _end(5))
    assert counts == {"failed": 1}


def test_malformed_skips_are_named(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('[[skip]]\nkernels = ["6.1"]\n')
    with pytest.raises(VmtestError, match=r"s\.toml is malformed"):
        load(tmp_path / "s.toml")


@pytest.mark.parametrize(("name", "says"), [("six", "neither a version"), ("/no/bzImage", "no kernel image")])
def test_no_such_kernel(name: str, says: str) -> None:
    with pytest.raises(VmtestError, match=says):
        kernel(name)
