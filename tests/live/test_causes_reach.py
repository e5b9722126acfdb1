"""Calls that empty a file by its name, and those that reach into another process: what they did to pages is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pagelens import why
from support.recording import Run, assert_complete, record

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")

CUT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
P = 4096
how, path = sys.argv[1], sys.argv[2].encode()
fd = os.open(path, os.O_RDWR | os.O_CREAT)
def fill():
    for i in range(32): os.pwrite(fd, b"x", i * P)
def call(number, *args):
    done = libc.syscall(ctypes.c_long(number), *args)
    assert done >= 0, (number, os.strerror(ctypes.get_errno()))
class How(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]
def empty(flags):
    if how == "truncate": call(76, path, ctypes.c_long(8 * P))
    elif how == "open": call(2, path, ctypes.c_long(os.O_RDWR | flags), ctypes.c_long(0))
    elif how == "creat": call(85, path, ctypes.c_long(0o600))
    elif how == "openat": call(257, ctypes.c_long(-100), path, ctypes.c_long(os.O_RDWR | flags), ctypes.c_long(0))
    else: call(437, ctypes.c_long(-100), path, ctypes.byref(How(os.O_RDWR | flags)), ctypes.c_long(24))
fill()
shared, private = (libc.mmap(None, 32 * P, 3, kind, fd, 0) for kind in (1, 2))
for i in range(32): ctypes.memset(shared + i * P, 1, 1)
ctypes.memset(private + 20 * P, 2, 1)      # a copy
if how not in ("truncate", "creat"): empty(0)   # without O_TRUNC it takes nothing
ctypes.memset(shared, 1, 1)
empty(os.O_TRUNC)
fill()
for i in (0, 12, 31): ctypes.memset(shared + i * P, 3, 1)
ctypes.memset(private + 20 * P, 3, 1)
print(shared, private)
"""


def _causes(run: Run, base: int, pages: int) -> list[tuple[int, str, str]]:
    result = why.classify(run.capture)
    faults = result.run.faults
    inside = (faults.addr >= base) & (faults.addr < base + pages * 4096) & (faults.time > run.mapped(base))
    rows = sorted(inside.nonzero()[0].tolist(), key=lambda r: int(faults.time[r]))
    return [
        ((int(faults.addr[r]) - base) >> 12, result.of(r).cause, result.of(r).confidence)
        for r in rows
        if not faults.failed[r]
    ]


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("how", ["truncate", "open", "openat", "openat2", "creat"])
def test_files_that_are_emptied_by_their_name(tmp_path: Path, how: str, where: str) -> None:
    disk = Path(__file__).parents[2] / ".cache"
    file = (disk if where == "disk" else Path("/dev/shm")) / f"{tmp_path.name}.cut"
    file.parent.mkdir(exist_ok=True)
    try:
        run = record(tmp_path, [sys.executable, "-c", CUT, how, file])
    finally:
        file.unlink(missing_ok=True)
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    shared, private = map(int, run.stdout.split())
    kept = how == "truncate"  # to 8 pages
    again = _causes(run, shared, 32)[32:]
    if kept and where == "disk":  # writing the file has cleaned its first page, perhaps
        again = [found for found in again if found[0] >= 8]
    expected = [] if kept else [(0, "after-truncate", "certain")]
    assert again == [*expected, (12, "after-truncate", "certain"), (31, "after-truncate", "certain")]
    assert _causes(run, private, 32) == [(20, "file-cow", "certain"), (20, "after-truncate", "certain")]
    # One call has the file: that which took pages out of it.
    name = f"name = '{how}' and kind = 'syscall' and file_inode is not null"
    inodes = {row["file_inode"] for row in run.rows("name = 'pwrite64'")}
    assert {row["file_inode"] for row in run.rows(name)} & inodes, "the file of the call"


REACH = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
P = 4096
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_long), ("size", ctypes.c_size_t)]
def reach(call, pid, ranges):
    size = sum(n for _, n in ranges)
    own = ctypes.create_string_buffer(b"y" * size)
    remote = (Iovec * len(ranges))(*(Iovec(a, n) for a, n in ranges))
    local = Iovec(ctypes.addressof(own), size)
    count = ctypes.c_ulong(len(ranges))
    done = call(pid, ctypes.byref(local), ctypes.c_ulong(1), remote, count, ctypes.c_ulong(0))
    assert done == size, os.strerror(ctypes.get_errno())
def both(pid, base):
    reach(libc.process_vm_writev, pid, [(base + 1 * P, 2 * P), (base + 5 * P + 100, 8)])
    reach(libc.process_vm_readv, pid, [(base + 8 * P, P)])
"""
TARGET = (
    REACH
    + """
base = libc.mmap(None, 16 * P, 3, 0x22, -1, 0)
WAIT
ctypes.memset(base + 2 * P, 1, 1)                    # there and writable: no fault
ctypes.memset(base + 8 * P, 1, 1)                    # over the zero page
assert libc.madvise(base, 16 * P, 4) == 0
for i in (1, 5, 6): ctypes.memset(base + i * P, 1, 1)
print(base)
"""
)
EXPECTED = [
    (8, "zero-page-write", "certain"),
    (1, "after-dontneed", "certain"),
    (5, "after-dontneed", "certain"),
    (6, "first-write", "certain"),
]


def test_pages_that_a_relative_reached(tmp_path: Path) -> None:
    wait = """
child = os.fork()
if child == 0: both(os.getppid(), base); os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    run = record(tmp_path, [sys.executable, "-c", TARGET.replace("WAIT", wait)])
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    base = int(run.stdout)
    assert _causes(run, base, 16) == EXPECTED
    (call,) = run.rows("name = 'process_vm_writev' and kind = 'syscall'")
    assert call["detail"] == f"{base + 4096:#x}+8192 {base + 5 * 4096 + 100:#x}+8"


def test_pages_that_somebody_else_reached(tmp_path: Path) -> None:
    ready, done = tmp_path / "ready", tmp_path / "done"
    wait = f"""
open({str(ready)!r} + ".new", "w").write(f"{{os.getpid()}} {{base}}")
os.rename({str(ready)!r} + ".new", {str(ready)!r})
import time
while not os.path.exists({str(done)!r}): time.sleep(0.01)
"""
    other = REACH + f"both(int(sys.argv[1]), int(sys.argv[2])); open({str(done)!r}, 'w')\n"
    command = f'while [ ! -s {ready} ]; do sleep 0.02; done; exec {sys.executable} -c "$0" $(cat {ready})'
    with subprocess.Popen(["sh", "-c", command, other]) as reacher:
        run = record(tmp_path, [sys.executable, "-c", TARGET.replace("WAIT", wait)])
        assert reacher.wait() == 0
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    assert _causes(run, int(run.stdout), 16) == EXPECTED
