"""Exact page states of a child that maps and touches what it is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pagelens.linux import frames, pagescan, snapshot
from pagelens.linux.probe import capability_status
from pagelens.vm import AddrRange, PageState, Prot
from support import raw
from support.pace import EMULATED
from support.puppet import (
    MAP_ANON,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_NONE,
    PROT_READ,
    Puppet,
)
from support.subjects import Subjects

ANON = PageState.PRESENT | PageState.EXCLUSIVE
# Where the kernel has soft-dirty, new pages carry it; it is no matter of these tests.
KEEP = ~PageState.SOFT_DIRTY


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as child:
        yield child


def states(pid: int, start: int, pages: int) -> dict[int, PageState]:
    """page number in the range -> state."""
    runs = snapshot.take(pid, accounting=False, within=AddrRange(start, start + pages * PAGE)).pages
    assert runs is not None
    return {
        (addr - start) // PAGE: PageState(state) & KEEP
        for addr, state in zip(runs.addresses().tolist(), runs.states().tolist(), strict=True)
    }


def settled(pid: int) -> None:
    """Wait until the child sleeps in its read."""
    for _ in range(1000):
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "S":
                return
        time.sleep(0.001)


def test_only_touched_pages_are_there(puppet: Puppet) -> None:
    base = puppet.island(1000)
    puppet.write(base + 3 * PAGE, 5)
    puppet.write(base + 900 * PAGE)
    expected = dict.fromkeys([3, 4, 5, 6, 7, 900], ANON)
    assert states(puppet.pid, base, 1000) == expected


def test_vma_list_is_exact(puppet: Puppet) -> None:
    base = puppet.island(10)
    puppet.sys("mprotect", base + 2 * PAGE, 3 * PAGE, PROT_READ)
    puppet.sys("munmap", base + 7 * PAGE, PAGE)
    vmas = [v for v in snapshot.take(puppet.pid).vmas if base <= v.start < base + 10 * PAGE]
    rw = Prot.READ | Prot.WRITE
    assert [((v.start - base) // PAGE, (v.end - base) // PAGE, v.prot, v.shared) for v in vmas] == [
        (0, 2, rw, False),
        (2, 5, Prot.READ, False),
        (5, 7, rw, False),
        (8, 10, rw, False),
    ]
    assert all("wr" in v.vm_flags for v in vmas if v.vm_flags is not None and v.prot & Prot.WRITE)


def test_zero_page_then_write(puppet: Puppet) -> None:
    base = puppet.island(4)
    puppet.read(base, 4)
    assert states(puppet.pid, base, 4) == dict.fromkeys(range(4), PageState.PRESENT | PageState.ZERO)
    puppet.write(base + PAGE)
    assert states(puppet.pid, base, 4)[1] == ANON


@pytest.mark.requires("kpagecount", "pfn")
def test_fork_shares_frames_until_written(puppet: Puppet) -> None:
    base = puppet.island(8)
    puppet.write(base, 8)
    parent, child = puppet.pid, puppet.fork()
    where = AddrRange(base, base + 8 * PAGE)
    before = snapshot.take(child, frames=True, within=where).pages
    assert before is not None and before.mapcount is not None and before.pfn is not None
    assert before.mapcount.tolist() == [2] * 8
    puppet.write(base, 3)
    mine = snapshot.take(child, frames=True, within=where).pages
    theirs = snapshot.take(parent, frames=True, within=where).pages
    assert mine is not None and mine.mapcount is not None and mine.pfn is not None
    assert theirs is not None and theirs.mapcount is not None and theirs.pfn is not None
    assert mine.mapcount.tolist() == theirs.mapcount.tolist() == [1] * 3 + [2] * 5
    assert (mine.pfn == theirs.pfn).tolist() == [False] * 3 + [True] * 5
    # EXCLUSIVE is of the mapping, not of the frame: false for shared ones, in both.
    assert [bool(s & PageState.EXCLUSIVE) for s in states(child, base, 8).values()] == [True] * 3 + [
        False
    ] * 5
    puppet.back()


@pytest.mark.requires("guard-pages")
def test_guard_pages(puppet: Puppet) -> None:
    base = puppet.island(8)
    puppet.write(base, 8)
    puppet.madvise(base + 2 * PAGE, 2, "GUARD_INSTALL")
    expected = dict.fromkeys(range(8), ANON)
    expected[2] = expected[3] = PageState.GUARD
    assert states(puppet.pid, base, 8) == expected
    puppet.madvise(base + 2 * PAGE, 1, "GUARD_REMOVE")
    del expected[2]
    assert states(puppet.pid, base, 8) == expected


@pytest.mark.parametrize("reach", [4, 3])
def test_memfd_pages_are_file_pages(puppet: Puppet, reach: int) -> None:
    name = puppet.line  # any string will do as a name: the line buffer
    fd = puppet.sys("memfd_create", name, 0)
    puppet.sys("ftruncate", fd, 16 * PAGE)
    one = puppet.mmap(16, flags=MAP_SHARED, fd=fd)
    table = (puppet.mmap(1024) + (2 << 20)) & -(2 << 20)  # where a page table begins
    two = puppet.mmap(16, flags=MAP_SHARED, fd=fd, at=table - reach * PAGE)
    puppet.write(one, 4)
    alone = PageState.PRESENT | PageState.FILE | PageState.EXCLUSIVE
    assert states(puppet.pid, one, 16) == dict.fromkeys(range(4), alone)
    puppet.read(two, 1)
    shared = states(puppet.pid, two, 16)
    # Fault-around mapped the others, as far as the page table goes (do_fault_around).
    assert [i for i, s in shared.items() if not s & PageState.EXCLUSIVE] == list(range(reach))
    assert all(s & PageState.FILE for s in shared.values())


@pytest.mark.requires("thp", "pagemap-scan")
def test_thp_is_huge(puppet: Puppet) -> None:
    base = puppet.mmap(1536)
    aligned = (base + (2 << 20) - 1) & ~((2 << 20) - 1)
    puppet.madvise(aligned, 512, "HUGEPAGE")
    puppet.write(aligned)
    assert states(puppet.pid, aligned, 512) == dict.fromkeys(range(512), ANON | PageState.HUGE)
    puppet.madvise(aligned, 1, "DONTNEED")  # splits the mapping
    after = states(puppet.pid, aligned, 512)
    assert list(after) == list(range(1, 512))
    assert not any(s & PageState.HUGE for s in after.values())


@pytest.mark.requires("thp", "pagemap-scan")
def test_huge_zero_page(puppet: Puppet) -> None:
    base = puppet.mmap(1536)
    aligned = (base + (2 << 20) - 1) & ~((2 << 20) - 1)
    puppet.madvise(aligned, 512, "HUGEPAGE")
    puppet.read(aligned)
    found = set(states(puppet.pid, aligned, 512).values())
    assert len(found) == 1
    assert {PageState.PRESENT, PageState.ZERO, PageState.HUGE} <= set(found.pop())


def test_sparse_terabyte_costs_what_it_maps(puppet: Puppet) -> None:
    # Without PAGEMAP_SCAN the kernel writes eight bytes for each page, mapped or not: minutes under emulation.
    size = 1 << 40 if capability_status("pagemap-scan")[0] or not EMULATED else 1 << 35
    pages = size // PAGE
    base = puppet.mmap(pages, PROT_NONE, MAP_PRIVATE | MAP_ANON | 0x4000)
    puppet.sys("mprotect", base + size // 2, 2 * PAGE, 3)
    puppet.write(base + size // 2, 2)
    at = pages // 2
    assert states(puppet.pid, base, pages) == {at: ANON, at + 1: ANON}


def test_accounting_matches_pages(puppet: Puppet) -> None:
    base = puppet.island(64)
    puppet.write(base, 40)
    puppet.read(base + 50 * PAGE, 5)  # zero pages: not in Rss
    settled(puppet.pid)
    shot = snapshot.take(puppet.pid)
    assert shot.complete, shot.notes
    assert shot.accounting is not None
    row = next(i for i, v in enumerate(shot.vmas) if v.start == base)
    assert shot.accounting.column("Size")[row] == 64 * PAGE
    assert shot.accounting.column("Rss")[row] == 40 * PAGE
    assert shot.accounting.column("Private_Dirty")[row] == 40 * PAGE
    assert shot.accounting.column("Anonymous")[row] == 40 * PAGE
    assert shot.accounting.total["Size"] == shot.vmas.pages * PAGE


def test_a_running_target_is_said(puppet: Puppet) -> None:
    shot = snapshot.take(os.getpid())
    assert not shot.complete
    assert "ran while" in shot.notes[-1]


def test_a_sparse_terabyte_without_pagemap_scan(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before 6.7: what spans too much is not read, and that is said; all else is, and a part that is asked for."""
    small = puppet.island(8)
    puppet.write(small, 5)
    wide = puppet.mmap(1 << 28, flags=MAP_PRIVATE | MAP_ANON | MAP_NORESERVE)
    puppet.sys("madvise", wide, 1 << 40, 15)  # MADV_NOHUGEPAGE
    puppet.write(wide, 3)
    monkeypatch.setattr(pagescan, "supported", lambda: pagescan.Category(0))
    settled(puppet.pid)
    snap = snapshot.take(puppet.pid)
    assert snap.pages is not None
    assert len(snap.pages.clipped(wide, wide + (1 << 40)).addresses()) == 0
    assert len(snap.pages.clipped(small, small + 8 * PAGE).addresses()) == 5
    assert not snap.complete
    assert "pages of the longest mappings, 1024 GiB in all, not read (no PAGEMAP_SCAN)" in snap.notes
    assert list(states(puppet.pid, wide, 100)) == [0, 1, 2]


@pytest.mark.requires("pfn", "kpageflags")
@pytest.mark.usefixtures("ksm", "no_numa_balancing")
def test_merged_pages_are_told_from_others(puppet: Puppet) -> None:
    """KPF_KSM, which 6.12 sets for every anonymous page: taken away where it cannot be true."""
    base = puppet.island(48)
    puppet.write(base, 48, value=5)

    def merged() -> list[int]:
        start = np.array([base], np.uint64)
        with open(f"/proc/{puppet.pid}/pagemap", "rb") as file:
            pages = frames.having(file.fileno(), start, start + np.uint64(48 * PAGE), frames.KSM)
        return [(page - base) // PAGE for page in pages.tolist()]

    assert merged() == []
    puppet.sys("madvise", base, 32 * PAGE, 12)  # MADV_MERGEABLE
    for _ in range(600):
        if len({entry & raw.PFN for entry in raw.pagemap(puppet.pid, base, 32)}) == 1:
            break
        time.sleep(0.05)
    assert merged() == list(range(32))
    puppet.write(base + 3 * PAGE, value=6)  # a copy, its own
    assert merged() == [i for i in range(32) if i != 3]
