"""Huge pages by the faults of their block, as columns that no kernel has to provide."""

from __future__ import annotations

import numpy as np

from pagelens.vm.snapshot import Snapshot
from pagelens.vm.vma import Prot, Vma, VmaList
from pagelens.why import classify_facts
from pagelens.why.facts import Facts, Faults, Task

BLOCK = 0x7F0000200000


def _causes(
    rows: list[tuple[int, int, int, int, int]], mm: int = 1, tasks: tuple[Task, ...] = ()
) -> list[str]:
    """rows: (ns done, latency, tid, page of the block, error code), all of one address space."""
    time, latency, tid, page, error = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    n = len(rows)
    faults = Faults(
        seq=np.arange(n) + 10,
        time=time,
        latency=latency,
        mm=np.full(n, mm),
        tid=tid,
        addr=(BLOCK + 4096 * page).astype(np.uint64),
        ip=np.zeros(n, np.uint64),
        error=error,
        call=np.full(n, -1),
        user=np.ones(n, bool),
        major=np.zeros(n, bool),
        failed=np.zeros(n, bool),
        new=np.full(n, -1),
    )
    first = Snapshot(5, 0, VmaList([Vma(BLOCK, BLOCK + (2 << 20), Prot(3))]))
    result = classify_facts(Facts(faults, (), tasks, {1: first}, {}, {"thp": "always", "calls": True}))
    return [result.of(i).cause for i in range(n)]


def test_a_fault_beside_the_one_that_made_it() -> None:
    made = (100_000, 50_000, 1, 3, 6)
    assert _causes([made]) == ["huge-page"]
    # Under way when the first was done: the block may well be a huge page, and is.
    assert _causes([made, (150_000, 80_000, 2, 200, 6)]) == ["huge-page", "huge-page"]
    # Begun later, and absent all the same: the pages of the block are small.
    assert _causes([made, (250_000, 80_000, 2, 200, 6)]) == ["first-write", "first-write"]


def test_what_came_with_it_is_the_own_of_who_wrote_it() -> None:
    # A child reads an inherited block (the huge zero page), writes over it, and forks before it writes to another page.
    forks = (
        Task(1, 50_000, 1, 5, 5, "fork", (6, 6, 0, 2)),
        Task(2, 400_000, 2, 6, 6, "fork", (7, 7, 0, 3)),
    )
    rows = [(200_000, 2_000, 6, 0, 4), (300_000, 50_000, 6, 0, 7), (500_000, 3_000, 6, 200, 7)]
    assert _causes(rows, 2, forks)[2] == "fork-cow-parent"
