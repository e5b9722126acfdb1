"""attach: to busy targets, exact from the moment on, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.pace import patience
from support.recording import SRC, Run, assert_complete, pagelens
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


def attach(directory: Path, pid: int, *args: str) -> Run:
    path, summary = directory / "a.plens", directory / "a.json"
    done = pagelens("attach", str(pid), "-c", str(path), "--force", "--summary-json", str(summary), *args)
    data = json.loads(summary.read_text()) if summary.exists() else {}
    return Run(done.returncode, done.stdout, done.stderr, data, path)


Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts programs whose output is read; ends what is left of them."""
    with contextlib.ExitStack() as stack:

        def start(*command: str | Path, **options: Any) -> subprocess.Popen[str]:
            options.setdefault("stdout", subprocess.PIPE)
            child = stack.enter_context(subprocess.Popen([str(c) for c in command], text=True, **options))
            stack.callback(child.kill)
            return child

        yield start


def watch(spawn: Spawn, directory: Path, pid: int, *args: str) -> subprocess.Popen[str]:
    """attach, until it is told to end; returns when it records."""
    watcher = spawn(
        *(sys.executable, "-m", "pagelens.cli.main", "attach", str(pid), "-c", directory / "a.plens"),
        *("--summary-json", directory / "a.json", *args),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    deadline = time.monotonic() + patience(30)
    while not list((directory / "a.plens").glob("spool/*.calls")):
        assert watcher.poll() is None, watcher.communicate()
        assert time.monotonic() < deadline, "attach does not begin to record"
        time.sleep(0.02)
    time.sleep(patience(0.5))  # the spool is there a little before the tasks are marked
    return watcher


def clean(pid: int) -> bool:
    return "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text()


def test_known_faults_from_the_moment_on(tmp_path: Path, spawn: Spawn) -> None:
    # Waits for us, touches 500 pages, makes a child that touches 200 more, and ends.
    program = (
        "import mmap, os, sys\n"
        "m = mmap.mmap(-1, 4096 * 2000)\n"
        "for i in range(1000): m[i * 4096] = 1\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for i in range(1000, 1500): m[i * 4096] = 1\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    for i in range(1500, 1700): m[i * 4096] = 1\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print(hex(__import__('ctypes').addressof(__import__('ctypes').c_char.from_buffer(m))), flush=True)\n"
    )
    child = spawn(sys.executable, "-c", program, stdin=subprocess.PIPE)
    assert child.stdout and child.stdin and child.stdout.readline() == "ready\n"
    watcher = watch(spawn, tmp_path, child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    base = int(child.stdout.readline(), 16)
    assert child.wait() == 0
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 0, err
    run = Run(0, "", err, json.loads((tmp_path / "a.json").read_text()), tmp_path / "a.plens")
    assert_complete(run)

    def touched(pid: str) -> list[int]:
        rows = run.rows(
            f"kind = 'fault' and {pid} {child.pid} and addr >= {base} and addr < {base + 4096 * 2000}"
        )
        return [(r["addr"] - base) // 4096 for r in rows]

    assert touched("pid =") == list(range(1000, 1500))
    assert touched("pid !=") == list(range(1500, 1700))
    assert [r["args"] for r in run.rows("name = 'start'")] == [[child.pid, child.pid, 0, 1]]
    assert run.capture.table("mms").num_rows == 2


SPINS = r"""
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void) {
  char *p = mmap(0, 4096 * 4096L, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  volatile unsigned long x = 0;
  char c;
  madvise(p, 4096 * 4096L, MADV_NOHUGEPAGE);
  printf("%p\n", (void *)p); fflush(stdout);
  read(0, &c, 1);
  for (long i = 0; i < 70; i++) p[i * 4096] = 1;
  for (;;) x++; }
"""


@pytest.mark.parametrize("detail", ["lean", "normal"])
def test_faults_before_a_busy_loop(tmp_path: Path, spawn: Spawn, detail: str) -> None:
    # Lean records stand in the task's batch until it is full or the task leaves its CPU; the end of the recording
    # fetches them.
    source = tmp_path / "t.c"
    source.write_text(SPINS)
    subprocess.run(["gcc", "-O1", "-o", tmp_path / "t", source], check=True)
    child = spawn(tmp_path / "t", stdin=subprocess.PIPE)
    assert child.stdout and child.stdin
    base = int(child.stdout.readline(), 16)
    watcher = watch(spawn, tmp_path, child.pid, "--detail", detail)
    child.stdin.write("x")
    child.stdin.flush()
    time.sleep(patience(0.3))
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, err
    assert child.poll() is None and clean(child.pid)
    run = Run(0, "", err, json.loads((tmp_path / "a.json").read_text()), tmp_path / "a.plens")
    assert_complete(run)
    rows = run.rows(f"kind = 'fault' and addr >= {base} and addr < {base + 70 * 4096}")
    assert [(r["addr"] - base) // 4096 for r in rows] == list(range(70))
    times = [r["time_ns"] for r in rows]
    assert times == sorted(times)


def test_threads_that_end_as_the_recording_does(tmp_path: Path, spawn: Spawn, subjects: Subjects) -> None:
    # Some thread is always between its last fault and its end: when the recording ends, its batch is still waited for.
    child = spawn(subjects("late_faults"))
    assert child.stdout and child.stdout.readline() == "ready\n"
    for detail in ("normal", *["lean"] * 12):
        run = attach(tmp_path, child.pid, "--duration", "0.1", "--snapshot", "none", "--detail", detail)
        assert_complete(run)
        assert run.faults["recorded"] > 100
    assert child.poll() is None and clean(child.pid)


THREADS = r"""
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static void *work(void *a) {
  unsigned long sum = 0;
  unsigned char *p = mmap(0, 300000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(p, (int)(long)a, 300000); for (int i = 0; i < 300000; i++) sum += p[i];
  munmap(p, 300000); return (void *)sum; }
int main(int argc, char **argv) {
  unsigned long sum = 0, rounds = 0;
  puts("ready"); fflush(stdout);
  for (; access(argv[argc - 1], F_OK); rounds++) { pthread_t t[3]; void *r;
    for (long k = 0; k < 3; k++) pthread_create(&t[k], 0, work, (void *)(k + 1));
    for (int k = 0; k < 3; k++) { pthread_join(t[k], &r); sum += (unsigned long)r; } }
  printf("%lu %lu\n", rounds, sum); return 0; }
"""


@pytest.mark.timeout(400)
def test_thread_churn_attach_and_detach_often(tmp_path: Path, spawn: Spawn) -> None:
    source = tmp_path / "t.c"
    source.write_text(THREADS)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", tmp_path / "t", source], check=True)
    child = spawn(tmp_path / "t", tmp_path / "stop")
    assert child.stdout
    child.stdout.readline()
    details = ("normal", "lean", "normal", "lean")
    runs = [attach(tmp_path, child.pid, "--duration", "0.15", "--detail", detail) for detail in details]
    for run in runs:
        assert run.returncode == 0, run.stderr
        assert run.faults["unexplained"] == 0
        # A fault that is just being handled while a task is marked is the only one that may be missed.
        assert run.faults["lost"] <= 3, run.stderr
        assert run.faults["recorded"] > 500
    assert clean(child.pid)
    (tmp_path / "stop").touch()
    rounds, total = map(int, child.stdout.readline().split())
    assert total == rounds * 300000 * 6
    assert child.wait() == 0


def test_tree(tmp_path: Path, spawn: Spawn) -> None:
    child = spawn("sh", "-c", "(while :; do /bin/true; done) & echo $!; wait", process_group=0)
    try:
        assert child.stdout
        inner = int(child.stdout.readline())
        alone = attach(tmp_path, child.pid, "--duration", "0.3")
        assert alone.faults["recorded"] == 0
        tree = attach(tmp_path, child.pid, "--duration", "0.4", "--tree")
        assert tree.returncode == 0, tree.stderr
        assert tree.faults["unexplained"] == 0
        pids = {r["pid"] for r in tree.rows("kind = 'fault'")}
        assert len(pids) > 3
        starts = {r["args"][0] for r in tree.rows("name = 'start'")}
        assert {child.pid, inner} <= starts
    finally:
        os.killpg(child.pid, signal.SIGKILL)


WORKERS = """
import mmap, os, sys, time
for _ in range(3):
    if os.fork() == 0:
        while True:
            with mmap.mmap(-1, 64 * 4096) as m:
                for i in range(0, len(m), 4096): m[i] = 1
            time.sleep(0.02)
print("ready", flush=True)
os.wait()
"""


def test_workers_that_ran_before_have_causes_too(tmp_path: Path, spawn: Spawn) -> None:
    child = spawn(sys.executable, "-c", WORKERS, process_group=0)
    try:
        assert child.stdout and child.stdout.readline() == "ready\n"
        tree = attach(tmp_path, child.pid, "--duration", "0.5", "--tree")
        assert_complete(tree)
        shots = [(r["pid"], r["moment"]) for r in tree.capture.table("snapshots").to_pylist()]
        assert len(set(shots)) == len(shots) == 8  # four processes, at both ends
        causes = {row["cause"]: row["share"] for row in tree.summary["causes"]}
        assert causes["shared-page"] > 0.8, causes
        assert "unknown" not in causes, causes
    finally:
        os.killpg(child.pid, signal.SIGKILL)


def test_tree_under_a_storm_of_forks(tmp_path: Path, spawn: Spawn, subjects: Subjects) -> None:
    # Hundreds of children start and end a second, some between two passes over the tasks: none is lost, none is harmed.
    storm = spawn(subjects("fork_storm"))
    assert storm.stdout and storm.stdout.readline() == "ready\n"
    for detail in ("normal", "lean", "normal"):
        tree = attach(tmp_path, storm.pid, "--tree", "--duration", "0.4", "--detail", detail)
        assert tree.returncode == 0, tree.stderr
        assert_complete(tree)
        assert tree.faults["recorded"] > 1000
        assert len(tree.capture.table("mms").to_pylist()) > 20
        status = Path(f"/proc/{storm.pid}/status").read_text()
        assert "TracerPid:\t0\n" in status
    storm.send_signal(signal.SIGINT)
    assert storm.wait(timeout=patience(10)) == 0


SHARERS = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
base = libc.mmap(None, 64 * 4096, 3, 0x22, -1, 0)
def put(first, last):
    for i in range(first, last): ctypes.memset(base + i * 4096, 1, 1)
put(0, 32)
go, done = os.pipe(), os.pipe()
if os.fork() == 0:
    put(24, 32)                     # its own since before the recording
    os.write(done[1], b"r"); os.read(go[0], 1)
    put(0, 8); put(24, 32)
    os.write(done[1], b"d"); os.read(go[0], 1)
    os._exit(0)
os.read(done[0], 1)
print(base, flush=True)
sys.stdin.readline()
put(8, 16)
os.write(go[1], b"g"); os.read(done[0], 1)
put(0, 8); put(16, 32)
os.write(go[1], b"g")
os.wait()
"""


@pytest.mark.requires("pfn")
def test_who_shared_pages_before_we_came(tmp_path: Path, spawn: Spawn) -> None:
    from pagelens.why import classify

    child = spawn(sys.executable, "-c", SHARERS, stdin=subprocess.PIPE)
    assert child.stdout and child.stdin
    base = int(child.stdout.readline())
    options = ("--tree", "-c", tmp_path / "a.plens", "--summary-json", tmp_path / "a.json")
    watcher = spawn(
        *(sys.executable, "-m", "pagelens.cli.main", "attach", str(child.pid), *options),
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    deadline = time.monotonic() + patience(30)
    while not list((tmp_path / "a.plens").glob("snapshots/part-*")):  # both have been looked at
        assert watcher.poll() is None and time.monotonic() < deadline, watcher.communicate()
        time.sleep(0.05)
    child.stdin.write("\n")
    child.stdin.flush()
    _, err = watcher.communicate(timeout=patience(30))
    assert watcher.returncode == 0, err
    assert child.wait() == 0
    run = Run(0, "", err, json.loads((tmp_path / "a.json").read_text()), tmp_path / "a.plens")
    assert_complete(run)
    result = classify(run.capture)
    faults = result.run.faults
    parent = next(r["mm"] for r in run.capture.table("mms").to_pylist() if r["pid"] == child.pid)

    def causes(first: int, last: int, mine: bool) -> set[str]:
        inside = (faults.addr >= base + first * 4096) & (faults.addr < base + last * 4096)
        rows = (inside & ((faults.mm == parent) == mine)).nonzero()[0].tolist()
        assert len(rows) in (0, last - first)
        return {
            v.cause if v.cause != "ambiguous" else "/".join(sorted(v.candidates))
            for v in map(result.of, rows)
        }

    assert causes(0, 8, False) == {"fork-cow-child"}
    assert causes(8, 16, True) == {"fork-cow-parent"}
    assert causes(16, 24, True) == {"fork-cow-parent"}
    # The child has copied these since. Whether anybody outside of the tree had them, nobody had looked; but the kernel
    # took no page for these writes.
    assert causes(0, 8, True) == {"sharers-gone"}
    assert causes(24, 32, True) == {"sharers-gone"}  # the kernel called them exclusively mapped
    assert causes(24, 32, False) == set()


def test_ctrl_c_detaches_and_reports(tmp_path: Path, spawn: Spawn) -> None:
    child = spawn("sleep", "60")
    watcher = watch(spawn, tmp_path, child.pid)
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 0, err
    assert "unexplained 0" in err
    assert child.poll() is None and clean(child.pid)


def test_killed_while_attached(tmp_path: Path, spawn: Spawn) -> None:
    # It works all the time that it is watched, and some time afterwards.
    code = (
        "import os, sys\nx = n = more = 0\n"
        "while more < 20:\n"
        "    x += sum(bytearray(b'\\1' * 200000)); n += 1; more += os.path.exists(sys.argv[1])\n"
        "print(n, x)"
    )
    child = spawn(sys.executable, "-c", code, tmp_path / "killed")
    watcher = watch(spawn, tmp_path, child.pid)
    watcher.kill()
    watcher.wait(10)
    (tmp_path / "killed").touch()
    out, _ = child.communicate(timeout=30)
    rounds, total = map(int, out.split())
    assert (child.returncode, total) == (0, rounds * 200000)
