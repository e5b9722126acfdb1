"""What others do to the tree, tasks that run on, and workers that no fork announces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.recording import assert_complete, record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


def test_until_program_counts_those_that_run_on(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    program = (
        f"{sys.executable} -c 'import time; x = bytearray(1 << 22); time.sleep(30)' >/dev/null 2>&1 & "
        f"echo $! > {pidfile}; sleep 1"
    )
    run = record(tmp_path, ["sh", "-c", program], "--until", "program")
    try:
        assert_complete(run)
        pid = int(pidfile.read_text())
        os.kill(pid, 0)
        assert "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text()
        rows = {t["pid"]: t for t in run.capture.table("tasks").to_pylist()}
        assert rows[pid]["end_ns"] is None
        assert rows[pid]["recorded"] > 1024
        assert "1 tasks run on" in run.stderr
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGKILL)


def test_clear_refs_by_the_program_and_by_others(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    program = (
        "import os, sys, time\n"
        "open('/proc/self/clear_refs', 'w').write('1')\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "time.sleep(0.8)\n"
    )
    helper = subprocess.Popen(
        ["sh", "-c", f"while [ ! -s {ready} ]; do sleep 0.02; done; echo 4 > /proc/$(cat {ready})/clear_refs"]
    )
    run = record(tmp_path, [sys.executable, "-c", program, ready])
    helper.wait()
    assert_complete(run)
    pid = ready.read_text()
    mine, other = run.rows(f"kind = 'syscall' and name = 'write' and detail = '{pid}'")
    assert (mine["args"][1], mine["pid"], mine["result"]) == (ord("1"), int(pid), 1)
    assert (other["args"][1], other["detail"]) == (ord("4"), pid)
    assert other["pid"] != int(pid)
    # The program's own is a call like any other; of the other one only the end is seen.
    assert mine["latency_ns"] > 0 and mine["stack_id"] is not None
    assert other["latency_ns"] is None and other["stack_id"] is None
    # Both act on the program's memory, whoever called.
    assert mine["mm"] == other["mm"] == run.rows(f"kind = 'task' and name = 'exit' and tid = {pid}")[0]["mm"]


WRITER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
own = ctypes.create_string_buffer(b"x" * 8)
def write(pid, address, size):
    local, remote = Iovec(ctypes.addressof(own), size), Iovec(address, size)
    args = pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), ctypes.c_ulong(0)
    done = libc.process_vm_writev(*args)
    assert done == size, os.strerror(ctypes.get_errno())
write(int(sys.argv[1]), int(sys.argv[2]), 5)
write(os.getpid(), ctypes.addressof(own), 3)
open(f"/proc/{os.getpid()}/clear_refs", "w").write("1")
"""


def test_writes_of_others_into_the_tree_and_only_those(tmp_path: Path) -> None:
    program = (
        "import ctypes, os, sys, time, threading\n"
        "mine = ctypes.create_string_buffer(8)\n"
        "def wait():\n"
        "    open(sys.argv[1] + '.new', 'w').write(f'{threading.get_native_id()} {ctypes.addressof(mine)}')\n"
        "    os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "    while not mine.value: time.sleep(0.01)\n"
        "thread = threading.Thread(target=wait)\n"  # the call may name any thread
        "thread.start(); thread.join()\n"
        "time.sleep(0.3)\n"
    )
    ready = tmp_path / "ready"
    command = f'while [ ! -s {ready} ]; do sleep 0.02; done; exec {sys.executable} -c "$0" $(cat {ready})'
    with subprocess.Popen(["sh", "-c", command, WRITER]) as other:
        run = record(tmp_path, [sys.executable, "-c", program, ready])
        assert other.wait() == 0
    assert_complete(run)
    tid = int(ready.read_text().split()[0])
    (call,) = run.rows("kind = 'syscall' and name = 'process_vm_writev'")
    assert (call["args"][0], call["result"], call["pid"]) == (tid, 5, other.pid)
    assert call["mm"] == run.rows(f"kind = 'task' and name = 'exit' and tid = {tid}")[0]["mm"]
    assert not run.rows(f"pid = {other.pid} and name = 'write'")


REACHER = """
import ctypes, os, sys
pid, address = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
def call(number, *args):
    assert libc.syscall(ctypes.c_long(number), *args) >= 0, (number, os.strerror(ctypes.get_errno()))
def reach(pid, address):
    page = address & ~4095
    vector = Iovec(page, 4096)
    call(440, os.pidfd_open(pid), ctypes.byref(vector), ctypes.c_long(1), ctypes.c_long(20), ctypes.c_long(0))
    pages, status = (ctypes.c_void_p * 1)(page), (ctypes.c_int * 1)()
    call(279, pid, ctypes.c_long(1), pages, None, status, ctypes.c_long(0))
    fd = os.open(f"/proc/{pid}/mem", os.O_WRONLY)
    os.pwrite(fd, b"abc", address)
    os.lseek(fd, address + 3, os.SEEK_SET)
    os.write(fd, b"de")
own = ctypes.create_string_buffer(8)
reach(os.getpid(), ctypes.addressof(own))
reach(pid, address)
"""


def test_calls_of_others_that_reach_the_tree(tmp_path: Path) -> None:
    program = (
        "import ctypes, os, sys, time\n"
        "mine = ctypes.create_string_buffer(8)\n"
        "open(sys.argv[1] + '.new', 'w').write(f'{os.getpid()} {ctypes.addressof(mine)}')\n"
        "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "while mine.raw[:5] != b'abcde': time.sleep(0.01)\n"
        "fd = os.open('/proc/self/mem', os.O_WRONLY)\n"
        "os.pwrite(fd, b'x', ctypes.addressof(mine))\n"
    )
    ready = tmp_path / "ready"
    command = f'while [ ! -s {ready} ]; do sleep 0.02; done; exec {sys.executable} -c "$0" $(cat {ready})'
    with subprocess.Popen(["sh", "-c", command, REACHER]) as other:
        run = record(tmp_path, [sys.executable, "-c", program, ready])
        assert other.wait() == 0
    assert_complete(run)
    pid, address = map(int, ready.read_text().split())
    rows = [r for r in run.rows("kind = 'syscall'") if r["pid"] == other.pid]
    assert [r["name"] for r in rows] == ["process_madvise", "move_pages", "pwrite64", "write"]
    madvise, move, first, second = rows
    assert (madvise["result"], madvise["args"][3]) == (4096, 20)
    assert (move["args"][0], move["result"]) == (pid, 0)
    assert (first["result"], first["args"][3], first["detail"]) == (3, address, "mem")
    assert (second["result"], second["args"][3], second["detail"]) == (2, address + 3, "mem")
    (own,) = run.rows(f"name = 'pwrite64' and detail = 'mem' and pid = {pid}")
    assert own["args"][3] == address and own["stack_id"] is not None
    assert {r["mm"] for r in (*rows, own)} == {
        run.rows(f"kind = 'task' and name = 'exit' and tid = {pid}")[0]["mm"]
    }


def test_exit_calls_are_there_with_their_stacks(tmp_path: Path) -> None:
    program = (
        "import os, sys, threading\n"
        "thread = threading.Thread(target=len, args=('',))\n"
        "thread.start(); thread.join()\n"
        "child = os.fork()\n"
        "if not child: os._exit(3)\n"
        "os.wait()\n"
        "sys.exit(7)\n"
    )
    run = record(tmp_path, [sys.executable, "-c", program])
    assert_complete(run)
    rows = run.rows("kind = 'syscall' and name in ('exit', 'exit_group')")
    assert sorted((r["name"], r["args"][0]) for r in rows) == [
        ("exit", 0),
        ("exit_group", 3),
        ("exit_group", 7),
    ]
    assert all(r["result"] is None and r["latency_ns"] is None and r["stack_id"] is not None for r in rows)
    ends = {r["tid"]: r["time_ns"] for r in run.rows("kind = 'task' and name = 'exit'")}
    assert all(r["time_ns"] < ends[r["tid"]] for r in rows)


def test_collapse_is_seen(tmp_path: Path) -> None:
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not thp.exists() or "[never]" in thp.read_text():
        pytest.skip("missing capability: thp")
    program = (
        "import mmap\n"
        "m = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "for i in range(0, 8 << 20, 4096): m[i] = 1\n"
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m)) + 0x1fffff & ~0x1fffff\n"
        "raise SystemExit(libc.madvise(ctypes.c_void_p(a), ctypes.c_size_t(2 << 20), 25) and 9)\n"
    )
    run = record(tmp_path, [sys.executable, "-c", program])
    if run.returncode == 9:
        pytest.skip("missing capability: MADV_COLLAPSE")
    assert_complete(run)
    rows = run.rows("kind = 'daemon' and name = 'collapse_huge_page'")
    assert [r["args"][1] for r in rows] == [1]  # SCAN_SUCCEED
    assert rows[0]["mm"] == 1


def test_io_uring_workers(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("uring_worker")])
    if run.returncode == 77:
        pytest.skip("missing capability: io_uring")
    assert run.returncode == 0
    assert_complete(run)
    first = int(run.stdout, 16)
    place = f"addr >= {first} and addr < {first + 16 * 4096}"
    faults = run.rows(f"kind = 'fault' and {place} and time_ns > {run.mapped(first)}")
    assert [f["addr"] // 4096 for f in faults] == [first // 4096 + i for i in range(16)]
    (worker,) = {f["tid"] for f in faults}
    assert worker != faults[0]["pid"]


def test_what_others_do_is_not_recorded(tmp_path: Path, subjects: Subjects) -> None:
    noise = subprocess.Popen(
        ["sh", "-c", f"while :; do {subjects('toucher')} 2000 >/dev/null; done"], process_group=0
    )
    try:
        time.sleep(0.1)
        run = record(tmp_path, [subjects("toucher"), "1000"])
        assert_complete(run)
        assert {e["pid"] for e in run.rows("kind in ('fault', 'task')")} == {
            run.capture.table("tasks").to_pylist()[0]["pid"]
        }
        assert run.faults["recorded"] < 1200
    finally:
        os.killpg(noise.pid, signal.SIGKILL)
        noise.wait()


@pytest.mark.parametrize("tool", ["gdb", "strace"])
def test_debuggers_inside_work_without_snapshots(tmp_path: Path, tool: str) -> None:
    command = {
        "gdb": ["gdb", "-q", "-batch", "-ex", "run", "/bin/true"],
        "strace": ["strace", "-f", "-o", str(tmp_path / "log"), "/bin/true"],
    }[tool]
    if shutil.which(tool) is None:
        pytest.skip(f"missing tool: {tool}")
    run = record(tmp_path, command, "--snapshot", "none")
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    if tool == "strace":
        assert "exited with 0" in (tmp_path / "log").read_text()
    else:
        assert "exited normally" in run.stdout


def test_leak_sanitizer_inside(tmp_path: Path) -> None:
    # One tracer a process: with our snapshots it cannot attach, and says so; without them it works.
    source = tmp_path / "leak.c"
    source.write_text(
        "#include <stdlib.h>\nint main(void) { void *volatile p = malloc(100); p = 0; return 0; }\n"
    )
    command = ["gcc", "-fsanitize=address", "-o", tmp_path / "leak", source]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("missing tool: AddressSanitizer of gcc")
    alone = subprocess.run([tmp_path / "leak"], capture_output=True, text=True)
    run = record(tmp_path, [tmp_path / "leak"], "--snapshot", "none")
    assert run.returncode == alone.returncode != 0
    assert "100 byte(s) leaked in 1 allocation" in run.stderr
    assert_complete(run)
    traced = record(tmp_path, [tmp_path / "leak"])
    assert "LeakSanitizer does not work under ptrace" in traced.stderr
    assert_complete(traced)
