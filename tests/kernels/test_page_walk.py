"""pagemap against the page tables themselves, walked from PGD to PTE in /proc/kcore."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import kcore, raw
from support.kcore import Kcore
from support.puppet import MAP_ANON, MAP_PRIVATE, PROT_READ, RW, Puppet
from support.subjects import Subjects

pytestmark = pytest.mark.requires("kcore", "btf", "pfn")


def _compare(pid: int, address: int, pages: int) -> int:
    """Asserts that each page's pagemap entry is what the page table says; how many are present."""
    with Kcore() as kernel:
        pgd = kernel.page_table(pid)
        found = raw.pagemap(pid, address, pages)
        present = 0
        for page, entry in enumerate(found):
            at = address + page * raw.PAGE
            real = kernel.walk(pgd, at)
            if real is None or not real.value & kcore.PRESENT:
                assert not entry & raw.PRESENT, f"page {page}"
                assert bool(entry & raw.SWAPPED) == (real is not None and real.value != 0), f"page {page}"
                continue
            present += 1
            assert entry & raw.PRESENT, f"page {page}"
            assert entry & raw.PFN == real.pfn, f"page {page}"
            assert real.value & kcore.USER
            if not real.level > 1:
                # The vma's own flag may say soft-dirty where the entry does not; never the other way round.
                assert entry & raw.SOFT_DIRTY or not real.value & kcore.SOFT_DIRTY, f"page {page}"
                assert bool(entry & raw.UFFD_WP) == bool(real.value & kcore.UFFD_WP), f"page {page}"
        return present


def test_written_read_and_untouched(puppet: Puppet) -> None:
    """Written, read only (zero page), never touched: and the permission bits that explain the next fault."""
    base = puppet.island(16)
    puppet.write(base, 4)
    puppet.read(base + 8 * raw.PAGE, 4)
    assert _compare(puppet.pid, base, 16) == 8
    with Kcore() as kernel:
        pgd = kernel.page_table(puppet.pid)
        written, zero = kernel.walk(pgd, base), kernel.walk(pgd, base + 8 * raw.PAGE)
        assert written is not None
        assert zero is not None
        assert written.value & kcore.WRITE
        assert written.value & kcore.DIRTY
        assert not zero.value & kcore.WRITE
        assert zero.pfn == kernel.walk(pgd, base + 9 * raw.PAGE).pfn  # type: ignore[union-attr]


@pytest.mark.requires("soft-dirty")
def test_soft_dirty_bits(puppet: Puppet) -> None:
    """After a clear: write-protected and clean in the tables; after one write, that page alone is neither."""
    base = puppet.island(8)
    puppet.write(base, 8)
    raw.clear_soft_dirty(puppet.pid)
    puppet.write(base + 3 * raw.PAGE)
    assert _compare(puppet.pid, base, 8) == 8
    with Kcore() as kernel:
        pgd = kernel.page_table(puppet.pid)
        values = [kernel.walk(pgd, base + p * raw.PAGE).value for p in range(8)]  # type: ignore[union-attr]
    assert [bool(v & kcore.SOFT_DIRTY) for v in values] == [p == 3 for p in range(8)]
    assert [bool(v & kcore.WRITE) for v in values] == [p == 3 for p in range(8)]


def test_huge_page_is_one_entry(subjects: Subjects, thp_always: None) -> None:
    """A huge page is mapped by its PMD: 512 pagemap entries, one entry of the table."""
    with Puppet(subjects("puppet")) as puppet:
        base = puppet.island(1536)
        huge = -(-base // (512 * raw.PAGE)) * 512 * raw.PAGE
        puppet.write(huge)
        assert _compare(puppet.pid, huge, 512) == 512
        with Kcore() as kernel:
            entry = kernel.walk(kernel.page_table(puppet.pid), huge + 17 * raw.PAGE)
            assert entry is not None
            assert entry.level == 2


def test_swapped_out(puppet: Puppet, swap: Path) -> None:
    """A swapped page's entry is not present and not empty."""
    base = puppet.island(16)
    puppet.write(base, 16)
    puppet.page_out(base, 8)
    assert raw.bits(puppet.pid, base, 16, raw.SWAPPED) == 8
    assert _compare(puppet.pid, base, 16) == 8


def test_after_fork_both_are_read_only(puppet: Puppet) -> None:
    """Parent and child point to the same frames, write-protected in both."""
    base = puppet.mmap(4, RW, MAP_PRIVATE | MAP_ANON)
    puppet.write(base, 4)
    parent = puppet.pid
    child = puppet.fork()
    with Kcore() as kernel:
        for page in range(4):
            ours = kernel.walk(kernel.page_table(parent), base + page * raw.PAGE)
            theirs = kernel.walk(kernel.page_table(child), base + page * raw.PAGE)
            assert ours is not None
            assert theirs is not None
            assert ours.pfn == theirs.pfn
            assert not (ours.value | theirs.value) & kcore.WRITE
    assert _compare(child, base, 4) == 4


def test_file_pages(puppet: Puppet, tmp_path: Path) -> None:
    """A private read-only file mapping: what the fault (and fault-around, see test_fault_around) mapped is there."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * raw.PAGE * 64)
    place = puppet.mmap(1)
    for offset, byte in enumerate(str(file).encode() + b"\0"):
        puppet.tell("write", place + offset, 1, 1, byte)
    fd = puppet.sys("open", place, 0)
    base = puppet.mmap(64, PROT_READ, MAP_PRIVATE, fd=fd)
    # Written out first: fault-around passes over folios that are locked for write-back.
    os.sync()
    puppet.read(base + 20 * raw.PAGE)
    assert _compare(puppet.pid, base, 64) >= 1
