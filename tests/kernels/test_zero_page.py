"""Reads of memory that was never written: the zero page, small and huge."""

from __future__ import annotations

from support import raw
from support.facts import Fact
from support.puppet import Puppet

HUGE_PAGES = 512


def test_read_then_write(puppet: Puppet, fact: Fact) -> None:
    """A read maps the zero page (no Rss, count 0), the write replaces it: two faults."""
    base = puppet.island(1)
    before = raw.faults(puppet.pid)[0]
    puppet.read(base)
    entry = raw.pagemap(puppet.pid, base, 1)[0]
    fact("zero_page.faults_of_read", raw.faults(puppet.pid)[0] - before)
    assert entry & raw.PRESENT
    fact("zero_page.counts_in_rss", raw.smaps(puppet.pid, base)["Rss"] != 0)
    fact("zero_page.kpagecount", raw.frame("count", entry & raw.PFN))
    puppet.write(base)
    fact("zero_page.faults_of_read_and_write", raw.faults(puppet.pid)[0] - before)
    assert raw.smaps(puppet.pid, base)["Rss"] == 4


def test_write_over_huge_zero_page(puppet: Puppet, fact: Fact) -> None:
    """MADV_HUGEPAGE, a read (huge zero page), then one write: a whole huge page, or one small page."""
    puppet.sys("prctl", 41, 0, 0, 0, 0)  # PR_SET_THP_DISABLE off again
    base = puppet.island(3 * HUGE_PAGES)
    huge = -(-base // (HUGE_PAGES * raw.PAGE)) * HUGE_PAGES * raw.PAGE
    puppet.madvise(huge, HUGE_PAGES, "HUGEPAGE")
    before = raw.faults(puppet.pid)[0]
    puppet.read(huge, HUGE_PAGES)
    fact("huge_zero.faults_of_512_reads", raw.faults(puppet.pid)[0] - before)
    puppet.write(huge)
    fact("huge_zero.rss_kb_after_one_write", raw.smaps(puppet.pid, huge)["Rss"])
    fact("huge_zero.faults_in_all", raw.faults(puppet.pid)[0] - before)
