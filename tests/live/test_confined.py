"""In a sandbox that forbids BPF and perf: what can be done is done, what cannot is said with its fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagelens.capture.reader import Capture
from support.recording import SRC
from support.subjects import Subjects

pytestmark = pytest.mark.requires("ptrace", "native")


def confined(
    subjects: Subjects, directory: Path, *argv: str | Path, by: str = "docker"
) -> subprocess.CompletedProcess[str]:
    """The command line under a seccomp filter like that of a container, or of a systemd unit."""
    command = [subjects("confined"), by, sys.executable, "-m", "pagelens.cli.main", *argv]
    env = {**os.environ, "PYTHONPATH": str(SRC), "PAGELENS_TRACEBACK": "1"}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=100, env=env, cwd=directory
    )
    if done.returncode == 99:
        pytest.skip("missing capability: seccomp filters")
    return done


LOOP = """
import mmap
while True:
    with mmap.mmap(-1, 1 << 16) as m:
        m[0] = 1
"""


def test_run_counts_what_it_cannot_see(tmp_path: Path, subjects: Subjects) -> None:
    summary, capture = tmp_path / "s.json", tmp_path / "c.plens"
    options = ["--summary-json", summary, "-c", capture, "--calls", "ptrace"]
    done = confined(subjects, tmp_path, "run", *options, "--", subjects("calls"))
    assert done.returncode == 3, done.stderr
    assert done.stdout.split()[1:] == [str(sum(range(64)) + 16), "7"]
    told = json.loads(summary.read_text())
    faults = told["faults"]
    counted = faults["counted_minor"] + faults["counted_major"]
    assert (faults["recorded"], faults["lost"], faults["unexplained"]) == (0, 0, 0)
    assert faults["gup"] >= 96 and faults["gup"] + faults["kernel_mode_unseen"] == counted > 150
    assert not told["complete"] and told["status"] == "partial"
    assert "neither BPF nor perf is allowed here" in told["method"]
    found = Capture(capture)
    tasks = found.table("tasks").to_pylist()
    assert sum(t["min_flt"] + t["maj_flt"] for t in tasks) == counted
    assert len(tasks) == 3  # the program, its thread, its child
    moments = [row["moment"] for row in found.snapshot_rows()]
    assert sorted(moments) == ["exec", "exit", "exit"]
    names = {e["name"] for e in found.events(["kind", "name"]).to_pylist()}
    assert {"munmap", "madvise", "mremap", "fork", "exec", "exit"} <= names
    shown = confined(subjects, tmp_path, "map", capture)
    assert shown.returncode == 0, shown.stderr


def test_attach_counts_too(tmp_path: Path, subjects: Subjects) -> None:
    summary = tmp_path / "s.json"
    with subprocess.Popen([sys.executable, "-c", LOOP]) as child:
        try:
            options = ["--duration", "0.3", "--summary-json", summary, "-c", tmp_path / "c.plens"]
            done = confined(subjects, tmp_path, "attach", str(child.pid), *options)
        finally:
            child.kill()
    assert done.returncode == 0, done.stderr
    told = json.loads(summary.read_text())
    assert told["faults"]["kernel_mode_unseen"] == told["faults"]["counted_minor"] > 0
    assert not told["complete"]
    assert "what it starts is not followed" in done.stderr


@pytest.mark.parametrize(("by", "snapshot"), [("docker", "none"), ("systemd", "full"), ("systemd", "none")])
def test_without_stops_the_counters_are_left(
    tmp_path: Path, subjects: Subjects, by: str, snapshot: str
) -> None:
    summary, capture = tmp_path / "s.json", tmp_path / "c.plens"
    program = (
        "import mmap, os\n"
        "if os.fork() == 0:\n"
        "    m = mmap.mmap(-1, 512 << 12)\n"
        "    for i in range(512): m[i << 12] = 1\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "m = mmap.mmap(-1, 1024 << 12)\n"
        "for i in range(1024): m[i << 12] = 1\n"
        "import resource\n"
        "own, children = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))\n"
        "print(own.ru_minflt + own.ru_majflt + children.ru_minflt + children.ru_majflt, flush=True)\n"
        "os._exit(7)\n"
    )
    options = ["--snapshot", snapshot, "--summary-json", summary, "-c", capture]
    done = confined(subjects, tmp_path, "run", *options, "--", sys.executable, "-c", program, by=by)
    assert done.returncode == 7, done.stderr
    faults = (told := json.loads(summary.read_text()))["faults"]
    counted = faults["counted_minor"] + faults["counted_major"]
    # What it saw itself of its counters, and its end.
    assert int(done.stdout) - 50 <= counted <= int(done.stdout) + 50
    assert counted > 1500
    assert (faults["recorded"], faults["unexplained"], faults["kernel_mode_unseen"]) == (0, 0, counted)
    assert (told["complete"], told["status"]) == (False, "partial")
    assert "wait4" in told["method"]
    assert Capture(capture).snapshot_rows() == []
    assert ("no snapshots" in done.stderr) == (snapshot == "full")


def test_calls_by_ptrace_need_it(tmp_path: Path, subjects: Subjects) -> None:
    options = ["--calls", "ptrace", "-c", tmp_path / "c.plens"]
    done = confined(subjects, tmp_path, "run", *options, "--", "true", by="systemd")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert "ptrace" in done.stderr and "fix: see pagelens doctor" in done.stderr
    assert not (tmp_path / "c.plens").exists()


def test_doctor_names_the_sandbox(tmp_path: Path, subjects: Subjects) -> None:
    done = confined(subjects, tmp_path, "doctor", "--format", "json")
    rows = {row["capability"]: row for row in json.loads(done.stdout)}
    assert "docker run --cap-add PERFMON" in rows["perf-own"]["fix"]
    assert "SystemCallFilter=userfaultfd" in rows["userfaultfd"]["fix"]
    if os.geteuid() == 0:
        assert "--cap-add BPF" in rows["bpf"]["fix"]
