"""Causes that need a kernel or a setting that the development machine lacks: run in guests."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pagelens.why import classify_facts
from pagelens.why.load import load
from support.recording import record

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


@pytest.mark.requires("soft-dirty")
def test_writes_after_clear_refs(tmp_path: Path) -> None:
    run = record(tmp_path, [sys.executable, "-c", CLEARED])
    result = classify_facts(load(run.capture))
    start = int(run.stdout)
    faults = result.run.faults
    inside = (faults.addr >= start) & (faults.addr < start + 64 * 4096)
    causes = Counter(result.of(row).cause for row in np.flatnonzero(inside).tolist())
    assert causes == {"first-write": 64, "soft-dirty": 64}


PAGED_OUT = """
import mmap
m = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(64): m[i * 4096] = 1
m.madvise(21)
for i in range(64): m[i * 4096]
"""


@pytest.mark.requires("swap")
def test_anonymous_pages_come_back_from_swap(tmp_path: Path) -> None:
    run = record(tmp_path, [sys.executable, "-c", PAGED_OUT])
    result = classify_facts(load(run.capture))
    causes = {str(row["cause"]): int(str(row["faults"])) for row in result.counts()}
    # Pages that still stood in an LRU batch stay where they are.
    assert causes["after-pageout"] >= 32, causes
    assert "unknown" not in causes, causes
