"""What counts as a failure: of a test, of a guest, of a skip that nobody allowed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from vmtest.errors import VmtestError
from vmtest.fetch import Kernel, kernel
from vmtest.matrix import Outcome, Plan, judge, record
from vmtest.skips import Allowed, load
from vmtest.verdict import End, Verdict

KERNEL = Kernel("6.1", "6.1.0-1-cloud-amd64", Path("/nowhere"), None, None)
ALLOWED = [Allowed((6, 7), (), "tests/live/*", "pagemap-scan", "6.7 brought it")]


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


@pytest.mark.parametrize(
    ("release", "covered"),
    [("6.1.0-50-cloud-amd64", True), ("6.6.3", True), ("6.7.0-rc1", False), ("7.2.13", False)],
)
def test_a_skip_holds_for_kernels_older_than_its_version(release: str, covered: bool) -> None:
    """Also for a kernel of one's own, whose name says nothing."""
    own = Kernel("bzImage", release, Path("/nowhere"), None, None)
    assert ALLOWED[0].covers(own, "tests/live/a.py::x", "missing capability: pagemap-scan") is covered


def test_a_kernel_of_ones_own(tmp_path: Path) -> None:
    """Its release is read from the image itself, its modules and configuration are found beside it."""
    image = tmp_path / "bzImage"
    head = bytearray(0x400)
    head[0x202:0x206], head[0x20E:0x210] = b"HdrS", (0x100).to_bytes(2, "little")
    text = b"6.9.1-mine (me@here) #1 SMP\0"
    head[0x300 : 0x300 + len(text)] = text
    image.write_bytes(head)
    found = kernel(str(image))
    assert (found.name, found.release, found.modules, found.config) == ("bzImage", "6.9.1-mine", None, None)
    (tmp_path / "lib/modules/6.9.1-mine/kernel").mkdir(parents=True)
    (tmp_path / "lib/modules/6.12.0-other/kernel").mkdir(parents=True)
    (tmp_path / ".config").touch()
    found = kernel(str(image))
    assert (found.modules, found.config) == (tmp_path / "lib/modules/6.9.1-mine", tmp_path / ".config")
    image.write_bytes(bytes(0x400))
    with pytest.raises(VmtestError, match="is no bzImage"):
        kernel(str(image))


def test_what_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Facts of kernels with a version, all of them and as expected; the page is made of them."""
    repository = Path(__file__).parents[2]
    for directory in ("tools", "tests/kernels", "docs/kernels"):
        (tmp_path / directory).mkdir(parents=True)
    shutil.copy(repository / "tools/kernels_table.py", tmp_path / "tools")
    shutil.copy(repository / "tests/kernels/expected.toml", tmp_path / "tests/kernels")
    plan = Plan(tmp_path, [], [], results=tmp_path / "results")

    def facts(version: str, *names: str) -> str:
        return json.dumps({"kernel": f"Debian {version}", "facts": dict.fromkeys(names, 1)})

    one, other = "zero_page.faults_of_read", "zero_page.kpagecount"
    wrong = "call: E AssertionError: zero_page.x: measured 2, expected 1 on kernel 6.12.0"
    outcomes = []
    for name, why, end in (
        ("6.1", "call: E assert False", End.EXITED),  # of a test that measures nothing
        ("6.12", wrong, End.EXITED),
        ("6.18", "", End.EXITED),
        ("7.2", "", End.HANG),
        ("bzImage", "", End.EXITED),
    ):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "facts.json").write_text(facts(name, one))
        (tmp_path / f"docs/kernels/{name}.json").write_text(facts("of old", one, *[other] * (name == "6.18")))
        tests = [{"test": "tests/kernels/test_x.py::x", "outcome": "failed" if why else "passed", "why": why}]
        outcomes.append(Outcome(name, f"{name}.0", _end(0, end), Counter(), [], tests))
    (tmp_path / "docs/kernels/bzImage.json").unlink()
    record(outcomes, plan)
    assert capsys.readouterr().out.splitlines() == [
        "6.12: not recorded: not as expected: tests/kernels/test_x.py::x",
        f"6.18: not recorded: not measured this time: {other}",
        "7.2: not recorded: the guest hung",
        "bzImage: not recorded: a kernel of one's own has no column",
    ]
    assert "| measured on | Debian 6.1 | Debian of old |" in (tmp_path / "docs/kernels.md").read_text()
