"""Causes that need a kernel or a setting that the development machine lacks: run in guests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pagelens.why import classify_facts
from pagelens.why.load import load
from support.recording import record

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


CLEARED = """
import mmap
m = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(64): m[i * 4096] = 1
with open("/proc/self/clear_refs", "w") as f: f.write("4")
for i in range(0, 64, 2): m[i * 4096] = 2
for i in range(64): m[i * 4096] = 3
"""


@pytest.mark.requires("soft-dirty")
def test_writes_after_clear_refs(tmp_path: Path) -> None:
    run = record(tmp_path, [sys.executable, "-c", CLEARED])
    result = classify_facts(load(run.capture))
    causes = {str(row["cause"]): int(str(row["faults"])) for row in result.counts()}
    assert causes["soft-dirty"] >= 64, causes
    assert causes.get("spurious", 0) < 5, causes
    assert "unknown" not in causes, causes


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
