"""hugetlb memory as `map` and `pages` show it."""

from __future__ import annotations

import pytest

from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.vm import PageState
from pagelens.vm.regions import Kind
from support.puppet import MAP_ANON, MAP_HUGETLB, MAP_PRIVATE, RW, Puppet

HUGE = 2 << 20


@pytest.mark.requires("hugetlb")
def test_hugetlb(puppet: Puppet) -> None:
    base = puppet.sys("mmap", 0, 2 * HUGE, RW, MAP_PRIVATE | MAP_ANON | MAP_HUGETLB, -1, 0)
    puppet.write(base)
    with Process.open(puppet.pid) as proc:
        shot = snapshot.take(proc)
        found, _ = regions.regions(proc, shot.vmas)
    (region,) = [r for r in found if r.start <= base < r.end]
    assert (region.kind, region.pages) == (Kind.HUGETLB, 1024)
    assert shot.pages is not None and shot.accounting is not None
    here = shot.pages.clipped(base, base + 2 * HUGE)
    assert here.count_where(PageState.PRESENT) == 512
    assert shot.accounting.column("Private_Hugetlb")[region.vma] == HUGE
    assert shot.accounting.column("Rss")[region.vma] == 0
