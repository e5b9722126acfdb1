"""Recording without BPF: exact counts by perf events, and the gap stated where the kernel's counter knows more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagelens.capture.reader import Capture
from support.nobody import as_nobody
from support.recording import record
from support.subjects import Subjects

PAGES = 500
pytestmark = pytest.mark.requires("perf-own", "ptrace", "native")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that every user may use (pytest's belongs to one)."""
    with tempfile.TemporaryDirectory(prefix="pagelens-test-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def unprivileged(directory: Path, command: list[str], *options: str) -> tuple[dict[str, Any], Path, str]:
    """`run` as nobody; the summary and the capture."""
    argv = [
        "run",
        "-c",
        str(directory / "c.plens"),
        "--summary-json",
        str(directory / "s.json"),
        *options,
        "--",
    ]
    warm = ["run", "-c", str(directory / "warm.plens"), "--method", "perf", "--", "/bin/true"]
    done = as_nobody([*argv, *command], [warm], directory)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "s.json").read_text()), directory / "c.plens", done.stdout


def test_kernel_mode_faults_are_counted_as_unseen(open_path: Path) -> None:
    command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]
    summary, path, _ = unprivileged(open_path, command)
    faults = summary["faults"]
    # dd's buffer is 16,384 pages, filled by the kernel in read(2); besides, only a few pages that the kernel
    # touches for itself (execve's stack and bss).
    assert 16_384 <= faults["kernel_mode_unseen"] < 16_384 + 40
    assert (
        faults["recorded"] + faults["kernel_mode_unseen"] == faults["counted_minor"] + faults["counted_major"]
    )
    assert (faults["lost"], faults["unexplained"]) == (0, 0)
    assert not summary["complete"] and summary["status"] == "partial"
    assert "kernel mode" in summary["method"]
    rows = Capture(path).events(["kind", "user_mode"]).to_pylist()
    assert {r["user_mode"] for r in rows if r["kind"] == "fault"} == {True}


def test_each_first_touch_is_one_fault_in_each_process(open_path: Path, subjects: Subjects) -> None:
    program = shutil.copy(subjects("touch_fork"), open_path)
    _, path, out = unprivileged(open_path, [str(program), str(PAGES)])
    base = int(out, 16)
    rows = Capture(path).events(["kind", "name", "pid", "mm", "addr", "time_ns"]).to_pylist()
    hits = [r for r in rows if r["kind"] == "fault" and base <= r["addr"] < base + PAGES * 4096]
    by_pid = Counter(r["pid"] for r in hits)
    assert sorted(by_pid.values()) == [PAGES, PAGES]
    for pid in by_pid:
        assert {r["addr"] for r in hits if r["pid"] == pid} == {base + i * 4096 for i in range(PAGES)}
    assert len({r["mm"] for r in hits}) == 2, "a fork child has its own address space"
    assert Counter(r["name"] for r in rows if r["kind"] == "task") == {"fork": 1, "exec": 1, "exit": 2}


def test_root_without_bpf_sees_kernel_mode_faults(tmp_path: Path) -> None:
    run = record(tmp_path, ["dd", "if=/dev/zero", "of=/dev/null", "bs=4M", "count=1"], "--method", "perf")
    kernel = run.rows("kind = 'fault' and not user_mode")
    if run.faults["kernel_mode_unseen"] >= 1024:
        pytest.skip("missing capability: perf-kernel (faults in kernel mode are hidden from this user)")
    assert len(kernel) >= 1024
    assert run.faults["lost"] == 0 and run.faults["unexplained"] == 0


def test_a_small_ring_states_its_loss(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("touch"), "65536"], "--method", "perf", "--ring-size", "4096")
    faults = run.faults
    assert faults["lost"] > 0
    assert any("ring full" in line for line in run.stderr.splitlines())
    counted = faults["counted_minor"] + faults["counted_major"]
    assert faults["recorded"] + faults["lost"] + faults["kernel_mode_unseen"] == counted
    assert run.summary["status"] != "complete" and not run.summary["complete"]


def test_mappings_are_known_without_system_calls(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("touch_fork"), str(PAGES)], "--method", "perf")
    base = int(run.stdout, 16)
    maps = run.rows("kind = 'syscall'")
    assert {row["name"] for row in maps} == {"mmap"}
    area = [
        row for row in maps if row["result"] <= base and base + PAGES * 4096 <= row["result"] + row["args"][1]
    ]
    assert area, "the subject's mmap was seen"
    assert area[0]["args"][2] == 3 and area[0]["args"][3] & 0x22 == 0x22  # read, write; private, anonymous
    libc = [row for row in maps if "libc" in (row["detail"] or "")]
    assert libc and all(row["file_inode"] for row in libc)


def test_attach_follows_threads_of_before_and_after(tmp_path: Path, subjects: Subjects) -> None:
    program = subprocess.Popen(
        [subjects("on_demand"), "300"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert program.stdin is not None and program.stdout is not None
    base = int(program.stdout.readline(), 16)
    capture, summary = tmp_path / "a.plens", tmp_path / "a.json"
    words = [
        "attach",
        str(program.pid),
        "--method",
        "perf",
        "-c",
        str(capture),
        "--summary-json",
        str(summary),
    ]
    recorder = subprocess.Popen(
        [sys.executable, "-m", "pagelens.cli.main", *words],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        shots = capture / "spool"
        until = time.monotonic() + 60
        # The snapshot at attach is taken when all threads are followed; it holds the vmas.
        while not any(capture.glob("vmas/*.parquet")) and time.monotonic() < until:
            time.sleep(0.05)
        assert shots.is_dir()
        program.stdin.write(b"\n")
        assert program.stdout.readline() == b"done\n"
        recorder.send_signal(signal.SIGINT)
        _, errors = recorder.communicate(timeout=60)
        assert recorder.returncode == 0, errors
    finally:
        recorder.kill()
        program.stdin.write(b"\n")
        program.stdin.close()
        assert program.wait(10) == 0
        program.stdout.close()
    rows = Capture(capture).events(["kind", "tid", "addr", "name"]).to_pylist()
    hits = [r for r in rows if r["kind"] == "fault" and base <= r["addr"] < base + 900 * 4096]
    assert sorted(r["addr"] for r in hits) == [base + i * 4096 for i in range(900)]
    assert sorted(Counter(r["tid"] for r in hits).values()) == [300, 300, 300]
    faults = json.loads(summary.read_text())["faults"]
    assert faults["lost"] == 0
    # The late thread has ended before: its counters are gone with it, and the summary says so.
    assert "1 tasks whose counters could not be read" in errors


def test_calls_by_ptrace_without_privilege(open_path: Path, subjects: Subjects) -> None:
    program = str(shutil.copy(subjects("calls"), open_path))
    argv = ["run", "-c", str(open_path / "c.plens"), "--summary-json", str(open_path / "s.json")]
    warm = ["run", "-c", str(open_path / "warm.plens"), "--calls", "ptrace", "--", "/bin/true"]
    done = as_nobody([*argv, "--calls", "ptrace", "--", program], [warm], open_path)
    assert done.returncode == 3, done.stderr
    base, total, child = done.stdout.split()
    assert (int(total), child) == (sum(range(64)) + 16, "7"), "the program's own result"
    summary = json.loads((open_path / "s.json").read_text())
    faults = summary["faults"]
    counted = faults["counted_minor"] + faults["counted_major"]
    assert faults["recorded"] + faults["gup"] + faults["kernel_mode_unseen"] == counted
    assert faults["lost"] == faults["unexplained"] == 0
    assert "calls by ptrace" in summary["method"]
    capture = Capture(open_path / "c.plens")
    rows = [r for r in capture.events().to_pylist() if r["kind"] == "syscall"]
    start = int(base, 16)
    (populate,) = (r for r in rows if r["name"] == "mmap" and r["result"] == start)
    assert (populate["gup"], populate["args"][1]) == (64, 64 * 4096)
    (lock,) = (r for r in rows if r["name"] == "mlock")
    assert lock["gup"] == 32
    assert faults["gup"] == sum(r["gup"] for r in rows) >= 96
    names = Counter(r["name"] for r in rows)
    assert (names["mremap"], names["munlock"]) == (1, 1)
    assert len({r["tid"] for r in rows if r["name"] == "munmap"}) >= 3, "a thread's and a child's too"
    assert sorted(r["args"][0] for r in rows if r["name"] == "exit_group") == [3, 7]
    assert {(r["result"], r["latency_ns"]) for r in rows if r["name"] in ("exit", "exit_group")} == {
        (None, None)
    }
    (advice,) = (r for r in rows if r["name"] == "madvise" and r["args"][0] == start)
    hits = [
        r
        for r in capture.events().to_pylist()
        if r["kind"] == "fault"
        and start <= r["addr"] < start + 16 * 4096
        and r["time_ns"] > advice["time_ns"]
    ]
    assert len(hits) == 16


def test_calls_by_ptrace_makes_no_sense_elsewhere(tmp_path: Path) -> None:
    for other in (("--method", "bpf"), ("--snapshot", "none")):
        run = record(tmp_path, ["true"], "--calls", "ptrace", *other)
        assert run.returncode == 125
        assert run.stderr.startswith("pagelens: --calls ptrace") and run.stderr.count("\n") == 1
