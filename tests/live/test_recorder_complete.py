"""recorded + gup + lost = counted, exactly, for programs of every shape."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from support.pace import EMULATED
from support.recording import assert_complete, record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")

THREADS = r"""
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
static void *work(void *a) { char *p = malloc(200000); memset(p, 1, 200000); free(p); return a; }
int main(void) {
  for (int i = 0; i < 60; i++) { pthread_t t[4];
    for (int k = 0; k < 4; k++) pthread_create(&t[k], 0, work, 0);
    for (int k = 0; k < 4; k++) pthread_join(t[k], 0); }
  return 0; }
"""
DAEMON = """
import os, sys
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
x = bytearray(4 << 20)
for i in range(0, len(x), 4096): x[i] = 1
open(sys.argv[1], "w").write("done")
"""
IGNORER = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(10):
    if os.fork() == 0:
        bytearray(1 << 20); os._exit(0)
time.sleep(0.1)
"""


@pytest.mark.parametrize("snapshot", ["none", "full"])
def test_gcc(tmp_path: Path, snapshot: str) -> None:
    source = tmp_path / "hello.c"
    source.write_text('#include <stdio.h>\nint main(void) { puts("hi"); return 0; }\n')
    run = record(tmp_path, ["gcc", "-O2", source, "-o", tmp_path / "hello"], "--snapshot", snapshot)
    assert run.returncode == 0
    assert_complete(run)
    paths = {m["path"] for m in run.capture.table("mms").to_pylist()}
    assert any(p and p.endswith("cc1") for p in paths)


def test_python_with_160_children(tmp_path: Path) -> None:
    children = 40 if EMULATED else 160
    code = f"import subprocess\nfor i in range({children}): subprocess.run(['/bin/true'])"
    run = record(tmp_path, [sys.executable, "-c", code], "--snapshot", "none")
    assert run.returncode == 0
    assert_complete(run)
    assert len(run.rows("kind = 'task' and name = 'exec'")) == children + 1
    assert len({t["pid"] for t in run.capture.table("tasks").to_pylist()}) == children + 1


def test_pipeline(tmp_path: Path) -> None:
    run = record(tmp_path, ["sh", "-c", "seq 20000 | sort -R | wc -l"])
    assert run.stdout.strip() == "20000"
    assert_complete(run)


def test_thread_churn(tmp_path: Path) -> None:
    source = tmp_path / "threads.c"
    source.write_text(THREADS)
    import subprocess

    subprocess.run(["gcc", "-O1", "-pthread", "-o", tmp_path / "threads", source], check=True)
    run = record(tmp_path, [tmp_path / "threads"])
    assert_complete(run)
    assert run.capture.table("tasks").num_rows == 241
    assert run.capture.table("mms").num_rows == 1


def test_double_forking_daemon(tmp_path: Path) -> None:
    run = record(tmp_path, [sys.executable, "-c", DAEMON, tmp_path / "out"])
    assert (tmp_path / "out").read_text() == "done"
    assert_complete(run)
    assert run.capture.table("tasks").num_rows == 3
    daemon = run.rows("kind = 'task' and name = 'fork'")[1]["args"][0]
    recorded = {t["pid"]: t["recorded"] for t in run.capture.table("tasks").to_pylist()}
    assert recorded[daemon] > 1024


def test_children_that_nobody_waits_for(tmp_path: Path) -> None:
    run = record(tmp_path, [sys.executable, "-c", IGNORER])
    assert_complete(run)
    assert run.capture.table("tasks").num_rows == 11


def test_vfork_and_exec(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("vforker")])
    assert run.returncode == 0
    assert_complete(run)
    fork = run.rows("kind = 'task' and name = 'fork'")
    assert len(fork) == 3
    # A vfork child uses its parent's address space until its execve.
    assert {f["args"][3] for f in fork} == {1}
    assert [e["args"] for e in run.rows("kind = 'task' and name = 'exec'")] == [
        [0, 1],
        [1, 2],
        [1, 3],
        [1, 4],
    ]


def test_killed(tmp_path: Path) -> None:
    code = "import os\nx = bytearray(8 << 20)\nos.kill(os.getpid(), 9)"
    run = record(tmp_path, [sys.executable, "-c", code])
    assert run.returncode == -signal.SIGKILL
    assert_complete(run)
    assert run.capture.table("tasks").to_pylist()[0]["exit_code"] == 9


@pytest.mark.parametrize("detail", ["lean", "normal"])
def test_fast_faults(tmp_path: Path, subjects: Subjects, detail: str) -> None:
    pages = 65_536 if EMULATED and detail == "lean" else 262_144
    run = record(tmp_path, [subjects("toucher"), str(pages)], "--detail", detail)
    assert_complete(run)
    first = int(run.stdout, 16)
    addresses = run.capture.events(["addr", "kind"]).column("addr").drop_null().to_numpy()
    inside = addresses[(addresses >= first) & (addresses < first + pages * 4096)]
    assert np.array_equal(inside, np.arange(first, first + pages * 4096, 4096, dtype=inside.dtype))


def test_tiny_ring_loses_and_says_so(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("toucher"), "65536"], "--ring-size", "4096")
    faults = run.faults
    assert faults["lost"] > 1000
    assert faults["unexplained"] == 0
    assert (
        faults["recorded"] + faults["gup"] + faults["lost"]
        == faults["counted_minor"] + faults["counted_major"]
    )
    assert run.summary["status"] == "losses" and not run.summary["complete"]
    assert f"{faults['lost']:,} faults that found the ring full" in run.stderr
    events = run.capture.table("events", ["kind", "failed"]).to_pylist()
    assert sum(e["kind"] == "fault" and not e["failed"] for e in events) == faults["recorded"]
