"""Real guests that end badly: each is told for what it is, within its limit, with its console.

One is quick enough for every run; the others need `-m slow`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmtest import fetch

pytestmark = pytest.mark.timeout(600)  # a boot on a busy machine takes a minute
ROOT = Path(__file__).parents[2]
# Two real-time threads that never sleep, and no throttling: nothing else runs, not even a sign of life.
HANG = (
    "echo -1 >/proc/sys/kernel/sched_rt_runtime_us; "
    "for c in 0 1; do chrt -f 99 taskset -c $c sh -c 'while :; do :; done' & done; wait"
)


def _vmtest(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmtest", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools")} | environment,
    )


def test_panic_is_told(cached: None) -> None:
    done = _vmtest("in-kernel", "--memory", "1024", "6.12", "--", "sh", "-c", "echo c >/proc/sysrq-trigger")
    assert done.returncode == 1
    assert "the kernel panicked: sysrq triggered crash" in done.stderr
    assert "Call Trace" in done.stderr


@pytest.mark.slow
def test_exit_code_and_streams(cached: None) -> None:
    done = _vmtest("in-kernel", "6.1", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


@pytest.mark.slow
def test_hang_is_told(cached: None) -> None:
    began = time.monotonic()
    done = _vmtest("in-kernel", "--memory", "1024", "--silence", "15", "6.1", "--", "sh", "-c", HANG)
    assert done.returncode == 1
    assert re.search(r"the guest hung: no sign of life for 1[5-9] s", done.stderr), done.stderr
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_out_of_memory_is_told(cached: None) -> None:
    eat = "b = []\nwhile True: b.append(bytearray(b'x' * 2**24))"
    done = _vmtest("in-kernel", "--memory", "768", "7.2", "--", "python", "-c", eat)
    assert done.returncode == 137
    assert re.search(r"the guest ran out of memory: Killed process \d+ \(python\)", done.stderr), done.stderr


@pytest.mark.slow
def test_time_limit_is_told(cached: None) -> None:
    done = _vmtest("in-kernel", "--memory", "1024", "--timeout", "15", "6.12", "--", "sleep", "1000")
    assert done.returncode == 1
    assert "the time limit was reached: the command still ran after 15 s" in done.stderr


@pytest.mark.slow
def test_no_boot_is_told(cached: None, tmp_path: Path) -> None:
    done = _vmtest("in-kernel", "--append", "root=none init=/nothing rdinit=/nothing", "6.12", "--", "true")
    assert done.returncode == 1
    assert "the kernel panicked" in done.stderr


def _processes(mark: str) -> list[int]:
    # By what they were started with: everything of a guest lies in its scratch directory.
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in-kernel", "test-kernels", "killed"])
def test_nothing_is_left_of_an_interrupted_run(cached: None, tmp_path: Path, how: str) -> None:
    """Ctrl-C while a guest works: it ends at once, as do its files; killed outright, it still takes the guest along."""
    words = ["in-kernel", "--memory", "1024", "6.12", "--", "sh", "-c", "echo works; sleep 1000"]
    if how == "test-kernels":
        words = [
            "test-kernels",
            "6.1",
            "6.12",
            "--memory",
            "1024",
            "--tests",
            "tests/kernels/test_zero_page.py",
        ]
        words += ["--results", str(tmp_path / "results")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with subprocess.Popen(
        # A shell that runs us in the background has SIGINT ignored, and so would have this one.
        ["env", "--default-signal=INT", sys.executable, "-m", "vmtest", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools"), "TMPDIR": str(scratch)},
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline()
        guests = [p for p in _processes(str(scratch)) if p != run.pid]
        assert guests
        began = time.monotonic()
        os.killpg(run.pid, signal.SIGKILL if how == "killed" else signal.SIGINT)
        assert run.wait() == (-signal.SIGKILL if how == "killed" else 130)
        assert time.monotonic() - began < 30
        while _processes(str(scratch)) and time.monotonic() - began < 30:
            time.sleep(0.1)
    assert not _processes(str(scratch))
    if how != "killed":  # then only the files stay
        assert not list(scratch.iterdir())


@pytest.mark.slow
def test_a_kernel_of_ones_own(cached: None, tmp_path: Path) -> None:
    """A bzImage by its path, its modules beside it: its tests run, its release is told."""
    debian = fetch.kernel("6.12")
    assert debian.modules
    image = shutil.copy(debian.image, tmp_path / "bzImage")
    (tmp_path / "lib/modules").mkdir(parents=True)
    (tmp_path / "lib/modules" / debian.release).symlink_to(debian.modules)
    done = _vmtest(
        *(
            "test-kernels",
            str(image),
            "--tests",
            "tests/kernels/test_zero_page.py",
            "--results",
            str(tmp_path / "r"),
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"bzImage ({debian.release}): ") for line in lines)
    assert re.match(r"[1-9]\d* passed, 0 failed, 0 skipped", lines[-1])
    facts = json.loads((tmp_path / "r/bzImage/facts.json").read_text())
    assert facts["kernel"].startswith("Debian 6.12.")


@pytest.mark.slow
def test_a_broken_expectation_fails_on_the_kernel_it_concerns(cached: None, tmp_path: Path) -> None:
    """6.1's figure of case 1 is made wrong: 6.1 fails in that one test, 6.12 does not fail."""
    place = ROOT / "tests/kernels/.broken.toml"
    text = (ROOT / "tests/kernels/expected.toml").read_text()
    assert text.count('"6.1" = 25601, "6.7" = 0') == 1
    place.write_text(text.replace('"6.1" = 25601, "6.7" = 0', '"6.1" = 25600, "6.7" = 0'))
    try:
        done = _vmtest(
            *("test-kernels", "6.1", "6.12", "--tests", "tests/kernels/test_case1.py"),
            *("--results", str(tmp_path), "--set", f"PAGELENS_EXPECTED={place}"),
        )
    finally:
        place.unlink()
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-1] == "3 passed, 1 failed, 0 skipped"
    assert any(re.match(r"6\.1 .*: 1 passed, 1 failed", line) for line in lines)
    assert any(re.match(r"6\.12 .*: 2 passed, 0 failed", line) for line in lines)
    assert "measured 25601, expected 25600 on kernel 6.1" in done.stdout
