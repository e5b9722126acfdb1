"""Who shares a page after a fork: also where one of them has moved it, populated it, or had dropped it before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pagelens import why
from support.recording import assert_complete, record

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")

PROGRAM = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
P = 4096
anon = lambda how=0x22: libc.mmap(None, 32 * P, 3, how, -1, 0)
put = lambda base, i: ctypes.memset(base + i * P, 1, 1)
moved, filled, read_first, shared, there = anon(), anon(), anon(), anon(0x21), anon()
for i in range(16):
    put(moved, i); put(filled, i); ctypes.string_at(read_first + i * P, 1)
put(read_first, 20)  # or the child would not get the zero pages of it
for i in range(0, 256, 16): put(shared, i % 32)
assert libc.madvise(shared, 32 * P, 4) == 0          # DONTNEED
assert libc.madvise(read_first, 16 * P, 23) == 0     # POPULATE_WRITE: 16 pages of its own
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    assert libc.mremap(moved, 32 * P, 32 * P, 3, there) == there
    assert libc.madvise(filled, 8 * P, 23) == 0      # copies of pages 0 to 7
    put(shared, 3)
    os.write(ready[1], b"r"); os.read(go[0], 1)
    for i in range(8): put(there, i)                 # the parent has 8 to 15 copied meanwhile
    for i in range(8, 16): put(there, i)
    os._exit(0)
os.read(ready[0], 1)
for i in range(8, 16): put(moved, i)
for i in range(16): put(filled, i)
for i in range(16): put(read_first, i)
os.write(go[1], b"g")
os.wait()
print(moved, filled, read_first, shared, there)
"""


def test_moved_populated_and_dropped_pages(tmp_path: Path) -> None:
    run = record(tmp_path, [sys.executable, "-c", PROGRAM])
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    moved, filled, read_first, shared, there = map(int, run.stdout.split())
    result = why.classify(run.capture)
    faults = result.run.faults
    forked = run.rows("kind = 'task' and name = 'fork'")[0]
    parent, child = int(forked["mm"]), int(forked["args"][3])
    after = int(forked["time_ns"])

    def causes(mm: int, base: int, first: int, last: int) -> list[str]:
        inside = (faults.addr >= base + first * 4096) & (faults.addr < base + last * 4096)
        rows = (inside & (faults.mm == mm) & (faults.time > after)).nonzero()[0].tolist()
        return [result.of(r).cause for r in rows]

    assert causes(parent, moved, 8, 16) == ["fork-cow-parent"] * 8  # the child has them elsewhere
    assert causes(child, there, 0, 8) == ["fork-cow-child"] * 8
    assert causes(child, there, 8, 16) == ["sharers-gone"] * 8
    assert causes(parent, filled, 0, 8) == ["sharers-gone"] * 8  # the child's call has copied them
    assert causes(parent, filled, 8, 16) == ["fork-cow-parent"] * 8
    assert (
        causes(parent, read_first, 0, 16) == ["fork-cow-parent"] * 16
    )  # read, then populated: no zero pages
    assert causes(child, shared, 3, 4) == ["shared-page"]  # it had nothing of it that could come back
    assert result.shares()[0] == 0
