"""NUMA hint fault: the kernel unmaps pages for a moment, to see who uses them (task_numa_work,
do_numa_page).
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary, private
from pagelens.why.evidence import Area, Evidence, Huge, Mark, Prior
from pagelens.why.verdict import LIKELY


def _was_present(e: Evidence) -> bool:
    # A page of one's own (or, in anonymous memory, any). File and shared pages also go by reclaim: file_page.
    mine = e.prior in (Prior.ANON, Prior.POPULATED) if e.area is Area.ANON else e.prior is Prior.ANON
    quiet = ordinary(e) and not e.present and e.mark is Mark.NONE and not e.major and e.huge is not Huge.MADE
    return quiet and mine and private(e)


def _hint(e: Evidence) -> Finding | None:
    if not (e.numa and _was_present(e)):
        return None
    return Finding("a present page had been unmapped by nobody's call, and numa_balancing is on", LIKELY)


def _unmapped(e: Evidence) -> Finding | None:
    if e.numa or not _was_present(e):
        return None
    return Finding(
        "a present page had been unmapped by nobody's call: migration, compaction or reclaim", LIKELY
    )


RULE = Rule(
    "numa-hint",
    "NUMA hint fault",
    "numa_balancing=0, or bind the memory (mbind, numactl): a bound policy is not scanned",
    _hint,
)
RULE_UNMAPPED = Rule(
    "unmapped-by-kernel",
    "the kernel had unmapped a present page (migration, compaction, reclaim)",
    "vm.compaction_proactiveness=0, vm.compact_unevictable_allowed=0 and mlock for what must not wait",
    _unmapped,
)
