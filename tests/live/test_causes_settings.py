"""Causes that need a kernel or a setting that the development machine lacks: run in guests."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pagelens.why import classify_facts
from pagelens.why.load import load
from support.recording import Run, record

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


CLEARED = """
import ctypes, mmap
m = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(mmap.MADV_NOHUGEPAGE)
print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)
for i in range(64): m[i * 4096] = 1
with open("/proc/self/clear_refs", "w") as f: f.write("4")
for i in range(0, 64, 2): m[i * 4096] = 2
for i in range(64): m[i * 4096] = 3
"""


def _causes(run: Run, start: int) -> Counter[str]:
    # Of the 64 pages from `start` on.
    result = classify_facts(load(run.capture))
    faults = result.run.faults
    inside = (faults.addr >= start) & (faults.addr < start + 64 * 4096) & (faults.time > run.mapped(start))
    return Counter(result.of(row).cause for row in np.flatnonzero(inside).tolist())


@pytest.mark.requires("soft-dirty")
def test_writes_after_clear_refs(tmp_path: Path, no_numa_balancing: None) -> None:
    run = record(tmp_path, [sys.executable, "-c", CLEARED])
    assert _causes(run, int(run.stdout)) == {"first-write": 64, "soft-dirty": 64}


PAGED_OUT = """
import ctypes, mmap
m = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(mmap.MADV_NOHUGEPAGE)
print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)
for i in range(64): m[i * 4096] = 1
m.madvise(21)
for i in range(64): m[i * 4096]
for i in range(64): m[i * 4096] = 2
"""


def test_anonymous_pages_come_back_from_swap(tmp_path: Path, swap: Path, no_numa_balancing: None) -> None:
    run = record(tmp_path, [sys.executable, "-c", PAGED_OUT])
    causes = _causes(run, int(run.stdout))
    # Pages that still stood in an LRU batch stay where they are. Whether the read's entry is writable differs by
    # kernel; where it is not, the write faults too, for the same reason.
    assert causes["after-pageout"] >= 32, causes
    assert set(causes) == {"first-write", "after-pageout"}, causes
