"""NUMA hint fault: the kernel unmaps pages for a moment, to see who uses them (task_numa_work, do_numa_page).

A process of one thread takes them too: of its private memory only pages that are on another node than it runs on are
unmapped (change_pte_range). A page that the fault moved to another node is left read-only, so its next write faults
once more.
"""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule, ordinary, private, returned
from pagelens.why.evidence import Area, Evidence, Guarded, Huge, Mark, Prior
from pagelens.why.verdict import LIKELY


def _was_present(e: Evidence) -> bool:
    # A page of one's own (or, in anonymous memory, any). File and shared pages also go by reclaim: file_page.
    mine = e.prior in (Prior.ANON, Prior.POPULATED) if e.area is Area.ANON else e.prior is Prior.ANON
    quiet = ordinary(e) and not e.present and e.mark is Mark.NONE and not e.major and e.huge is not Huge.MADE
    return quiet and mine and private(e)


def _read_back(e: Evidence) -> bool:
    return returned(e) and e.mark is Mark.NONE and e.guarded is Guarded.BACK


def _hint(e: Evidence) -> Finding | None:
    if e.numa and _read_back(e):
        return Finding("a hint fault had moved the page and left it read-only", LIKELY)
    if not (e.numa and _was_present(e)):
        return None
    return Finding("a present page had been unmapped by nobody's call, and numa_balancing is on", LIKELY)


def _unmapped(e: Evidence) -> Finding | None:
    if not e.numa and _read_back(e):
        return Finding(
            "the kernel had unmapped the page, and the fault that brought it back left it read-only", LIKELY
        )
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
