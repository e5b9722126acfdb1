"""recorded + gup + lost = counted, exactly, for programs of every shape."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.pace import EMULATED
from support.recording import assert_complete, record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")

# 4,000 short threads (EACH = 1000), made by four at once, some detached; each touches some pages of its own and says
# who it was.
THREADS = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
enum { MAKERS = 4, SPAN = 8 };
static char *base;
static volatile int tid[MAKERS * EACH];
static void *work(void *arg) {
  int n = (int)(intptr_t)arg;
  for (int i = 0; i < n % (SPAN + 1); i++) base[((size_t)n * SPAN + i) * 4096] = 1;
  if (n % 3 == 0) { char *p = malloc(150000); memset(p, 1, 150000); free(p); }
  tid[n] = (int)syscall(SYS_gettid);
  if (n % 2) pthread_exit(0);
  return arg; }
static void *make(void *arg) {
  for (int i = 0; i < EACH; i++) { pthread_t t; int n = (int)(intptr_t)arg * EACH + i;
    while (pthread_create(&t, 0, work, (void *)(intptr_t)n)) usleep(100);
    if (n % 5 == 0) pthread_detach(t); else pthread_join(t, 0); }
  return 0; }
int main(void) {
  pthread_t t[MAKERS];
  base = mmap(0, (size_t)MAKERS * EACH * SPAN * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  madvise(base, (size_t)MAKERS * EACH * SPAN * 4096, MADV_NOHUGEPAGE); /* a fault for each page */
  memset((void *)tid, 0, sizeof(tid));
  for (int i = 0; i < MAKERS; i++) pthread_create(&t[i], 0, make, (void *)(intptr_t)i);
  for (int i = 0; i < MAKERS; i++) pthread_join(t[i], 0);
  for (int n = 0; n < MAKERS * EACH; n++) while (!tid[n]) usleep(100);
  printf("%p", (void *)base);
  for (int n = 0; n < MAKERS * EACH; n++) printf(" %d", tid[n]);
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


@pytest.mark.parametrize("snapshot", ["none", "full"])
def test_thread_churn(tmp_path: Path, snapshot: str) -> None:
    source = tmp_path / "threads.c"
    source.write_text(THREADS)
    each = 100 if EMULATED else 1000
    threads = 4 * each
    flags = ["-O1", "-pthread", f"-DEACH={each}"]
    subprocess.run(["gcc", *flags, "-o", tmp_path / "threads", source], check=True)
    run = record(tmp_path, [tmp_path / "threads"], "--snapshot", snapshot)
    assert_complete(run)
    assert run.capture.table("tasks").num_rows == 1 + 4 + threads
    assert run.capture.table("mms").num_rows == 1
    # Each page that a thread says it touched has one fault, by that thread.
    words = run.stdout.split()
    base, tids = int(words[0], 16), [int(w) for w in words[1:]]
    place = f"addr >= {base} and addr < {base + threads * 8 * 4096}"
    faults = run.rows(f"kind = 'fault' and {place} and time_ns > {run.mapped(base)}")
    seen = [((f["addr"] - base) // 4096, f["tid"]) for f in faults]
    assert sorted(seen) == [(n * 8 + i, tid) for n, tid in enumerate(tids) for i in range(n % 9)]


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
    _, at = np.unique(inside, return_index=True)
    firsts = inside[np.sort(at)]
    assert np.array_equal(firsts, np.arange(first, first + pages * 4096, 4096, dtype=inside.dtype))
    # A second fault on a page is a hint of NUMA balancing: guests have two nodes, and are slow enough to be scanned.
    balancing = Path("/proc/sys/kernel/numa_balancing")
    assert len(inside) == pages or (balancing.exists() and balancing.read_text().strip() != "0")


@pytest.mark.parametrize("detail", ["lean", "normal"])
def test_tiny_ring_loses_and_says_so(tmp_path: Path, subjects: Subjects, detail: str) -> None:
    run = record(tmp_path, [subjects("toucher"), "65536"], "--ring-size", "4096", "--detail", detail)
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
