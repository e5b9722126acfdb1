"""Inherited perf events: exact counts, forks, losses, without privilege."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagelens.linux.perf_tasks import PerfTasks, PerfTotals
from pagelens.vm import PAGE_SIZE, CapabilityMissingError, TargetGoneError

FAULT, FORK, EXEC = 1, 3, 4
PAGES = 500

# Touches PAGES fresh pages in user mode, in each of two processes, and prints where.
CHILD = f"""
import mmap, os, ctypes
area = mmap.mmap(-1, {PAGES} * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
os.write(1, (str(base) + chr(10)).encode())
if os.fork() == 0:
    for i in range({PAGES}): area[i * 4096] = 1
    os._exit(0)
os.wait()
for i in range({PAGES}): area[i * 4096] = 1
"""


def records(data: bytes) -> Iterator[dict[str, Any]]:
    at = 0
    while at < len(data):
        kind, flags, nframes, ntext, pid, tid, mm, time, ip = struct.unpack_from("<4B4x3I4xQ8xQ", data, at)
        fixed = 56 if kind == FAULT else 120
        (addr,) = struct.unpack_from("<Q", data, at + 48)
        yield {
            "kind": kind,
            "flags": flags,
            "pid": pid,
            "tid": tid,
            "mm": mm,
            "time": time,
            "ip": ip,
            "addr": addr,
        }
        at += fixed + 8 * nframes + ntext
    assert at == len(data)


def record(
    tmp_path: Path, argv: list[str], **options: Any
) -> tuple[PerfTotals, list[dict[str, Any]], str, int]:
    spool = os.open(tmp_path / "spool", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    go, start = os.pipe()
    with PerfTasks(spool, **options) as perf:
        child = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; exec "$@"', "sh", *argv],
            stdin=go,
            stdout=subprocess.PIPE,
            text=True,
        )
        perf.add(child.pid, on_exec=True)
        perf.start()
        os.write(start, b"\n")
        out, _ = child.communicate()
        totals = perf.stop()
    for fd in (go, start):
        os.close(fd)
    data = os.pread(spool, 1 << 28, 0)
    os.close(spool)
    return totals, list(records(data)), out, child.pid


@pytest.mark.requires("perf-own")
def test_each_first_touch_is_one_fault_in_each_process(tmp_path: Path) -> None:
    totals, rows, out, pid = record(tmp_path, [sys.executable, "-c", CHILD], kernel=False)
    base = int(out)
    hits = [r for r in rows if r["kind"] == FAULT and base <= r["addr"] < base + PAGES * PAGE_SIZE]
    by_pid = Counter(r["pid"] for r in hits)
    assert set(by_pid.values()) == {PAGES}
    assert len(by_pid) == 2 and pid in by_pid
    for who in by_pid:
        assert {r["addr"] & ~0xFFF for r in hits if r["pid"] == who} == {
            base + i * PAGE_SIZE for i in range(PAGES)
        }
    assert all(r["flags"] & 1 for r in hits), "all in user mode"
    assert len({r["mm"] for r in hits}) == 2, "a fork child has its own address space"
    assert [r["time"] for r in rows] == sorted(r["time"] for r in rows), "merged by time over CPUs"
    assert (totals.lost, totals.lost_records, totals.error) == (0, 0, 0)
    assert totals.recorded == sum(r["kind"] == FAULT for r in rows)
    assert sum(r["kind"] == EXEC for r in rows) >= 1
    assert any(r["kind"] == FORK for r in rows)


@pytest.mark.requires("perf-own")
def test_a_small_ring_states_its_loss_exactly(tmp_path: Path, subjects: Any) -> None:
    argv = [str(subjects("touch")), "65536"]
    want, _, _, _ = record(tmp_path, argv, kernel=False, ring_bytes=1 << 19)
    got, _, _, _ = record(tmp_path, argv, kernel=False, ring_bytes=PAGE_SIZE)
    assert want.lost == 0 and want.recorded >= 65536
    assert got.lost > 0
    # Loader and libc take a handful of faults more or less (address layout differs by run).
    assert abs(got.recorded + got.lost - want.recorded) < 32


@pytest.mark.requires("perf-own")
def test_a_full_disk_is_reported_and_the_program_goes_on() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with PerfTasks(full, kernel=False) as perf:
        child = subprocess.Popen(["/bin/sh", "-c", "read -r _; exec /bin/true"], stdin=subprocess.PIPE)
        perf.add(child.pid, on_exec=True)
        perf.start()
        child.communicate(b"\n")
        totals = perf.stop()
    os.close(full)
    assert child.returncode == 0
    assert os.strerror(totals.error) == "No space left on device"


def test_a_task_that_is_gone_is_said_so(tmp_path: Path) -> None:
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    fd = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
    with PerfTasks(fd, kernel=False) as perf, pytest.raises((TargetGoneError, CapabilityMissingError)):
        perf.add(child.pid)
    os.close(fd)
