"""Giving memory back, and what then is left."""

from __future__ import annotations

import pytest

from support import raw
from support.facts import Fact
from support.puppet import PROT_NONE, PROT_READ, RW, Puppet
from support.subjects import Subjects


def test_page_tables_after_dontneed(puppet: Puppet, fact: Fact) -> None:
    """MADV_DONTNEED of 64 MiB: are the page tables given back too (PT_RECLAIM)?"""
    pages = 64 * 256
    base = puppet.island(pages)
    puppet.write(base, pages)
    full = raw.status(puppet.pid, "VmPTE")
    puppet.madvise(base, pages, "DONTNEED")
    freed = full - raw.status(puppet.pid, "VmPTE")
    fact("release.dontneed_frees_page_tables", freed >= 64)
    if freed:
        assert freed >= 30 * 4  # 31 or 32 whole tables lie within 64 MiB


@pytest.mark.requires("soft-dirty")
def test_dontneed_then_read_looks_clean(puppet: Puppet, fact: Fact) -> None:
    """The content changes to zeros and soft-dirty does not say so."""
    base = puppet.island(1)
    puppet.write(base)
    raw.clear_soft_dirty(puppet.pid)
    puppet.madvise(base, 1, "DONTNEED")
    assert puppet.read(base) == 0
    fact("release.dontneed_then_read_is_soft_dirty", raw.bits(puppet.pid, base, 1, raw.SOFT_DIRTY) == 1)


@pytest.mark.requires("soft-dirty")
def test_mremap_marks_all(puppet: Puppet, fact: Fact) -> None:
    """Moved pages all read soft-dirty."""
    base = puppet.island(4)
    puppet.write(base, 4)
    target = puppet.island(4)
    raw.clear_soft_dirty(puppet.pid)
    moved = puppet.sys("mremap", base, 4 * raw.PAGE, 4 * raw.PAGE, 3, target)
    assert moved == target
    fact("soft_dirty.pages_of_4_after_mremap", raw.bits(puppet.pid, target, 4, raw.SOFT_DIRTY))


@pytest.mark.requires("soft-dirty")
def test_read_only_and_back_stays_clean(puppet: Puppet, fact: Fact) -> None:
    """mprotect to read-only and back is no write."""
    base = puppet.island(4)
    puppet.write(base, 4)
    raw.clear_soft_dirty(puppet.pid)
    puppet.sys("mprotect", base, 4 * raw.PAGE, PROT_READ)
    puppet.sys("mprotect", base, 4 * raw.PAGE, RW)
    fact("soft_dirty.pages_of_4_after_mprotect_and_back", raw.bits(puppet.pid, base, 4, raw.SOFT_DIRTY))


def test_mprotect_none_and_back_faults(puppet: Puppet, fact: Fact) -> None:
    """Written pages made inaccessible and accessible again: how many faults do four writes take?"""
    base = puppet.island(4)
    puppet.write(base, 4)
    puppet.sys("mprotect", base, 4 * raw.PAGE, PROT_NONE)
    puppet.sys("mprotect", base, 4 * raw.PAGE, RW)
    before = raw.faults(puppet.pid)[0]
    puppet.write(base, 4)
    fact("mprotect.faults_of_4_writes_after_none_and_back", raw.faults(puppet.pid)[0] - before)


def test_parent_writes_after_child_is_gone(subjects: Subjects, fact: Fact) -> None:
    """After a fork's child has ended: one fault for each page, nothing copied (on one CPU: see below)."""
    # Pinned: a frame in another CPU's lru batch has a reference more, and is copied (do_wp_page drains its
    # own only).
    with Puppet(subjects("puppet"), "taskset", "-c", "0") as puppet:
        base = puppet.island(8)
        puppet.write(base, 8)
        frames = [e & raw.PFN for e in raw.pagemap(puppet.pid, base, 8)]
        assert all(frames)
        parent = puppet.pid
        puppet.fork()
        puppet.back()
        puppet.pid = parent
        puppet.read(base, 8)  # the parent's own stack and data are its own again after this
        before = raw.faults(parent)[0]
        puppet.write(base, 8)
        fact("fork.faults_of_8_writes_after_child_exit", raw.faults(parent)[0] - before)
        after = [e & raw.PFN for e in raw.pagemap(parent, base, 8)]
        fact("fork.copied_of_8_after_child_exit", sum(a != b for a, b in zip(frames, after, strict=True)))
