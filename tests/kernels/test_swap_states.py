"""Swapped pages as `pages`, smaps and `diff` show them."""

from __future__ import annotations

import time
from pathlib import Path

from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.report.diff import Moment, compare
from pagelens.vm import AddrRange, PageState
from support.puppet import PAGE, Puppet


def look(pid: int) -> Moment:
    with Process.open(pid) as proc:
        shot = snapshot.take(proc)
        return Moment(shot, regions.regions(proc, shot.vmas)[0], str(pid))


def test_swapped_pages(puppet: Puppet, swap: Path) -> None:
    base = puppet.island(64)
    puppet.write(base, 64)
    where = AddrRange(base, base + 64 * PAGE)
    before = look(puppet.pid)
    for _ in range(50):  # pages on a per-CPU list are not reclaimed at once
        puppet.page_out(base, 64)
        after = look(puppet.pid)
        assert after.shot.pages is not None
        out = after.shot.pages.clipped(where.start, where.end).count_where(PageState.SWAPPED)
        if out == 64:
            break
        time.sleep(0.1)
    assert out > 0
    found = compare(before, after, where=where)
    swapped = [p for p in found.pages if p.what == "swapped out"]
    assert sum(p.pages for p in swapped) == out
    assert found.explained["Swap"] == (out * PAGE, out * PAGE)
    assert found.explained["Rss"] == (-out * PAGE, -out * PAGE)
    puppet.read(base, 64)
    back = compare(after, look(puppet.pid), where=where)
    assert sum(p.pages for p in back.pages if p.what == "swapped in") == out
