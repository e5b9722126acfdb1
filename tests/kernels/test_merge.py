"""Which neighbours become one vma (mm/vma.c, mm/mmap.c: can_vma_merge_*, is_mergeable_anon_vma)."""

from __future__ import annotations

import pytest

from support import raw
from support.facts import Fact
from support.puppet import MAP_ANON, MAP_PRIVATE, PROT_NONE, PROT_READ, RW, Puppet

MAP_STACK = 0x20000


def test_equal_neighbours_unfaulted(puppet: Puppet, fact: Fact) -> None:
    base = puppet.island(4)
    puppet.sys("munmap", base, 4 * raw.PAGE)
    puppet.mmap(2, at=base)
    puppet.mmap(2, at=base + 2 * raw.PAGE)
    fact("merge.unfaulted_with_unfaulted", raw.vmas_in(puppet.pid, base, 4) == 1)


def test_faulted_then_new_mapping(puppet: Puppet, fact: Fact) -> None:
    base = puppet.island(4)
    puppet.sys("munmap", base + 2 * raw.PAGE, 2 * raw.PAGE)
    puppet.write(base)
    puppet.mmap(2, at=base + 2 * raw.PAGE)
    fact("merge.new_mapping_above_faulted", raw.vmas_in(puppet.pid, base, 4) == 1)


def test_map_stack_beside_plain(puppet: Puppet, fact: Fact) -> None:
    base = puppet.island(4)
    puppet.sys("munmap", base, 2 * raw.PAGE)
    puppet.mmap(2, RW, MAP_PRIVATE | MAP_ANON | MAP_STACK, at=base)
    fact("merge.map_stack_with_plain", raw.vmas_in(puppet.pid, base, 4) == 1)


@pytest.mark.parametrize(
    ("faulted", "name"), [("low", "low"), ("high", "high"), ("both", "both"), ("none", "none")]
)
def test_mprotect_back_to_equal(puppet: Puppet, fact: Fact, faulted: str, name: str) -> None:
    """Two halves made by mprotect, faulted each on its own, then made equal again by a second mprotect."""
    base = puppet.island(4, PROT_NONE)
    half = base + 2 * raw.PAGE
    puppet.sys("mprotect", base, 2 * raw.PAGE, RW)
    if faulted in ("low", "both"):
        puppet.write(base)
    if faulted in ("high", "both"):
        puppet.sys("mprotect", half, 2 * raw.PAGE, PROT_READ)
        puppet.read(half)
        puppet.sys("mprotect", half, 2 * raw.PAGE, PROT_NONE)
        # A read fault of anonymous memory makes an anon_vma only for a write; so write through a third
        # protection.
        puppet.sys("mprotect", half, 2 * raw.PAGE, RW | 4)
        puppet.write(half)
        puppet.sys("mprotect", half, 2 * raw.PAGE, PROT_NONE)
    puppet.sys("mprotect", half, 2 * raw.PAGE, RW)
    fact(f"merge.mprotect_equal_again.faulted_{name}", raw.vmas_in(puppet.pid, base, 4) == 1)


def test_mprotect_to_read_only_and_back(puppet: Puppet, fact: Fact) -> None:
    """VM_ACCOUNT: RW to R and to RW again on half of an unfaulted mapping."""
    base = puppet.island(4)
    puppet.sys("mprotect", base, 2 * raw.PAGE, PROT_READ)
    puppet.sys("mprotect", base, 2 * raw.PAGE, RW)
    fact("merge.protect_and_back_unfaulted", raw.vmas_in(puppet.pid, base, 4) == 1)
    puppet.sys("mprotect", base, 4 * raw.PAGE, PROT_READ)
    accounted = "ac" in str(raw.smaps(puppet.pid, base)["VmFlags"]).split()
    fact("merge.read_only_unfaulted_stays_accounted", accounted)


def test_hole_filled(puppet: Puppet, fact: Fact) -> None:
    """A hole between two faulted halves of one old mapping is filled: all three are one again."""
    base = puppet.island(6)
    puppet.write(base, 6)
    puppet.sys("munmap", base + 2 * raw.PAGE, 2 * raw.PAGE)
    assert raw.vmas_in(puppet.pid, base, 6) == 2
    puppet.mmap(2, at=base + 2 * raw.PAGE)
    fact("merge.hole_between_faulted_halves", raw.vmas_in(puppet.pid, base, 6))


def test_fork_child_merges(puppet: Puppet, fact: Fact) -> None:
    """In a fork's child a faulted mapping's anon_vma chain is longer: a new neighbour stays apart."""
    base = puppet.island(4)
    puppet.sys("munmap", base + 2 * raw.PAGE, 2 * raw.PAGE)
    puppet.write(base)
    puppet.fork()
    puppet.mmap(2, at=base + 2 * raw.PAGE)
    fact("merge.new_mapping_above_faulted_in_fork_child", raw.vmas_in(puppet.pid, base, 4) == 1)


@pytest.mark.requires("soft-dirty")
def test_merge_marks_soft_dirty(puppet: Puppet, fact: Fact) -> None:
    """A mapping that grows by a merge: what of the old pages reads soft-dirty, though nobody wrote."""
    base = puppet.island(8)
    puppet.sys("munmap", base + 6 * raw.PAGE, 2 * raw.PAGE)
    puppet.write(base, 6)
    raw.clear_soft_dirty(puppet.pid)
    puppet.mmap(2, at=base + 6 * raw.PAGE)
    fact("merge.soft_dirty_pages_of_6_after_growth", raw.bits(puppet.pid, base, 6, raw.SOFT_DIRTY))


@pytest.mark.requires("soft-dirty")
def test_mprotect_merge_soft_dirty(puppet: Puppet, fact: Fact) -> None:
    """Two clean halves made equal by mprotect: a merge of two old vmas."""
    base = puppet.island(4)
    puppet.write(base, 4)
    puppet.sys("mprotect", base, 2 * raw.PAGE, PROT_READ)
    raw.clear_soft_dirty(puppet.pid)
    puppet.sys("mprotect", base, 2 * raw.PAGE, RW)
    assert raw.vmas_in(puppet.pid, base, 4) == 1
    fact("merge.soft_dirty_pages_of_4_after_mprotect", raw.bits(puppet.pid, base, 4, raw.SOFT_DIRTY))
