"""CASES 1 on this kernel: a thread that only sleeps, beside 100 MB that were clean."""

from __future__ import annotations

import pytest

from support import raw
from support.facts import Fact
from support.puppet import Puppet

PAGES = 100 * 2**20 // raw.PAGE


@pytest.mark.requires("soft-dirty")
def test_thread_dirties_what_it_does_not_touch(puppet: Puppet, fact: Fact) -> None:
    """First thread: the whole malloc on 6.1 by the merge of two vmas; nothing from 6.12 on. Second:
    nothing."""
    block, _ = puppet.tell("malloc", PAGES * raw.PAGE)
    base, pages = block & -raw.PAGE, PAGES + 1  # malloc's header takes the start of a page more
    puppet.write(base + raw.PAGE, PAGES)
    raw.clear_soft_dirty(puppet.pid)
    puppet.write(block)  # the page with malloc's header stays known as written
    assert raw.bits(puppet.pid, base, pages, raw.SOFT_DIRTY) == 1
    raw.clear_soft_dirty(puppet.pid)
    assert raw.bits(puppet.pid, base, pages, raw.SOFT_DIRTY) == 0

    before = raw.faults(puppet.pid)[0]
    puppet.tell("thread")
    faults = raw.faults(puppet.pid)[0] - before
    fact("case1.dirty_after_first_thread", raw.bits(puppet.pid, base, pages, raw.SOFT_DIRTY))
    # Creating a thread does not fault its neighbour in: a handful of faults for 25,601 pages.
    assert faults < 32

    # Writing what is marked already changes nothing; where nothing was marked, it marks just that.
    fifth = PAGES // 5
    puppet.write(base + raw.PAGE, fifth)
    fact("case1.dirty_after_write_of_20_mb", raw.bits(puppet.pid, base, pages, raw.SOFT_DIRTY))

    raw.clear_soft_dirty(puppet.pid)
    puppet.tell("thread")
    fact("case1.dirty_after_second_thread", raw.bits(puppet.pid, base, pages, raw.SOFT_DIRTY))
    puppet.write(base + raw.PAGE, fifth)
    fact("case1.dirty_after_second_write_of_20_mb", raw.bits(puppet.pid, base, pages, raw.SOFT_DIRTY))


def test_stack_beside_malloc(puppet: Puppet, fact: Fact) -> None:
    """The first thread's stack lies right below the big malloc; whether they are one vma is the kernel's
    choice."""
    block, _ = puppet.tell("malloc", PAGES * raw.PAGE)
    _, inside = puppet.tell("thread")
    stack = raw.vma_at(puppet.pid, inside)
    chunk = raw.vma_at(puppet.pid, block)
    fact("case1.stack_touches_malloc", stack == chunk or stack[1] == chunk[0])
    fact("case1.stack_and_malloc_are_one_vma", stack == chunk)
    flags = str(raw.smaps(puppet.pid, inside)["VmFlags"]).split()
    fact("case1.stack_is_nohugepage", "nh" in flags)
