"""ftruncate and fallocate take pages from every mapping of a file: the faults that bring them back say so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pagelens import why
from support.recording import assert_complete, record

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")

PROGRAM = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
P = 4096
fd = os.memfd_create("m") if sys.argv[1] == "memfd" else os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 64 * P)
shared = mmap.mmap(fd, 64 * P)
private = mmap.mmap(fd, 64 * P, flags=mmap.MAP_PRIVATE)
base = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (shared, private)]
for i in range(64): shared[i * P] = 1
for i in range(0, 64, 8): private[i * P] = 1  # copies
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    for i in range(16, 32): shared[i * P] = 2
    os.write(ready[1], b"r"); os.read(go[0], 1)
    for i in range(16, 32): shared[i * P] = 3
    os._exit(0)
os.read(ready[0], 1)
assert libc.fallocate(fd, 3, 16 * P, 8 * P) == 0, os.strerror(ctypes.get_errno())  # hole: 16 to 24
for i in range(16, 20): shared[i * P] = 4
os.ftruncate(fd, 48 * P)
os.ftruncate(fd, 64 * P)
os.write(go[1], b"g")
for i in range(44, 52): shared[i * P] = 5
private[48 * P] = 6                        # its copy went too
os.wait()
print(*base)
"""


@pytest.mark.parametrize("kind", ["memfd", "disk"])
def test_pages_that_were_cut_out_of_their_file(tmp_path: Path, kind: str) -> None:
    file = kind if kind == "memfd" else str(Path(__file__).parents[2] / f".cache/{tmp_path.name}.cut")
    Path(file).parent.mkdir(exist_ok=True)
    try:
        run = record(tmp_path, [sys.executable, "-c", PROGRAM, file])
    finally:
        Path(file).unlink(missing_ok=True)
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    shared, private = map(int, run.stdout.split())
    result = why.classify(run.capture)
    faults = result.run.faults
    parent = int(run.rows("kind = 'task' and name = 'fork'")[0]["mm"])
    cut = [r for r in range(len(faults)) if result.of(r).cause == "after-truncate"]

    def pages(base: int, mine: bool) -> list[int]:
        inside = (r for r in cut if base <= faults.addr[r] < base + 64 * 4096)
        return sorted(
            (int(faults.addr[r]) - base) // 4096 for r in inside if (faults.mm[r] == parent) == mine
        )

    # Writes map no neighbours: each page has its fault.
    assert pages(shared, True) == [*range(16, 20), *range(48, 52)]
    assert pages(shared, False) == [*range(16, 24)]
    assert pages(private, True) == [48]
    assert all(result.of(r).confidence == "certain" for r in cut)
