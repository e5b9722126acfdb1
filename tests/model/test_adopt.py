"""A snapshot becomes a process that shows the same snapshot and goes on from there."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from model.support import BASE, NONE, PAGE, RW, SHARED, R, anon, process
from pagelens.model import Machine, Process, adopt
from pagelens.vm import Snapshot


def _family() -> list[Process]:
    p = process()
    f = p.machine.file("/lib/libc.so", 40 * PAGE)
    anon(p, 64, page=0)
    p.access(BASE, 40 * PAGE, "w")
    p.access(BASE + 50 * PAGE, 4 * PAGE, "r")
    p.mmap(BASE + 100 * PAGE, 40 * PAGE, RW, 0x12, f)
    p.access(BASE + 100 * PAGE, 40 * PAGE, "r")
    p.access(BASE + 110 * PAGE, 5 * PAGE, "w")
    p.mmap(BASE + 200 * PAGE, 8 * PAGE, RW, SHARED | 0x10)
    p.access(BASE + 200 * PAGE, 8 * PAGE, "w")
    anon(p, 4, NONE, page=300)
    anon(p, 4, R, page=400)
    p.mlock(BASE + 10 * PAGE, 2 * PAGE)
    p.madvise(BASE + 60 * PAGE, PAGE, 102)
    return [p, p.fork()]


def _key(snapshot: Snapshot) -> list[object]:
    assert snapshot.pages is not None and snapshot.accounting is not None
    pages, rows = snapshot.pages, snapshot.accounting.per_vma
    assert pages.mapcount is not None and rows is not None
    names = [f for f in snapshot.accounting.fields if f not in ("Referenced",)]
    return [
        list(snapshot.vmas),
        pages.addresses().tolist(),
        pages.states().tolist(),
        pages.mapcount.tolist(),
        [snapshot.accounting.column(f).tolist() for f in names],
        {
            k: v
            for k, v in snapshot.accounting.status.items()
            if k not in ("min_flt", "VmPTE", "VmPeak", "VmHWM")
        },
    ]


def test_round_trip_of_a_family() -> None:
    family = _family()
    machine = Machine("linux-6.18")
    adopted = adopt(machine, [p.snapshot() for p in family])
    assert adopted.notes == []
    machine.check()
    for was, now in zip(family, adopted.processes, strict=True):
        assert _key(now.snapshot()) == _key(was.snapshot())
    # And both go on alike.
    for side in (family, adopted.processes):
        got = [
            side[0].access(BASE, 40 * PAGE, "w").minor,
            side[1].access(BASE, 40 * PAGE, "w").minor,
            side[0].munmap(BASE + 5 * PAGE, 30 * PAGE),
            side[1].access(BASE + 100 * PAGE, 40 * PAGE, "w").minor,
            side[0].access(BASE + 60 * PAGE, 1, "r").signal,
        ]
        assert got == [40, 40, 0, 40, "SEGV"]
    machine.check()
    assert _key(adopted.processes[0].snapshot()) == _key(family[0].snapshot())


def test_one_of_two_sharers_alone_still_copies() -> None:
    family = _family()
    machine = Machine("linux-6.18")
    adopted = adopt(machine, [family[0].snapshot()])
    assert adopted.notes == ["45 shared pages whose other user was not seen: counted as mapped twice"]
    machine.check()
    p = adopted.processes[0]
    used = machine.frames.used
    assert p.access(BASE + 20 * PAGE, 4 * PAGE, "w").minor == 4
    assert machine.frames.used == used + 4


@pytest.mark.skipif(sys.platform != "linux", reason="missing capability: /proc")
def test_a_live_process_is_taken_over() -> None:
    snapshot_of = pytest.importorskip("pagelens.linux.snapshot").take
    code = "import sys, time; x = bytearray(5 << 20); print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        live = snapshot_of(child.pid)
    finally:
        child.kill()
        child.communicate()
    machine = Machine("linux-6.18")
    p = adopt(machine, [live]).processes[0]
    machine.check()
    mine = p.snapshot()
    assert live.pages is not None and mine.pages is not None and live.accounting is not None
    assert [v.range for v in mine.vmas] == [v.range for v in live.vmas]
    assert np.array_equal(mine.pages.addresses(), live.pages.addresses())
    assert mine.accounting is not None
    for name in ("Rss", "Anonymous"):
        ours, theirs = mine.accounting.column(name), live.accounting.column(name)
        assert np.array_equal(ours, theirs), name
    assert p.brk(0) == next(v.end for v in live.vmas if v.name == "[heap]")
    assert os.getpid() != p.pid == live.pid
