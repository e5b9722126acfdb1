"""Error codes that were not recorded: what the last snapshot tells of them, and what it does not."""

from __future__ import annotations

import numpy as np
import pytest

from pagelens.vm import PageRuns, PageState, Prot, Snapshot, Vma, VmaList
from pagelens.why import classify_facts
from pagelens.why.facts import Facts, Faults, Task

BASE = 0x7F0000000000


def facts(pages: list[int], end: dict[int, PageState], fork_at: int | None = None) -> Facts:
    """Faults on `pages` (index in an anonymous vma), one a µs, without error codes."""
    n = len(pages)
    times = 1000 * (1 + np.arange(n))
    faults = Faults(
        seq=np.arange(n) + 10,
        time=times,
        latency=np.full(n, -1),
        mm=np.ones(n, np.int64),
        tid=np.full(n, 5),
        addr=(BASE + 4096 * np.array(pages)).astype(np.uint64),
        ip=np.zeros(n, np.uint64),
        error=np.full(n, -1),
        call=np.full(n, -1),
        user=np.ones(n, bool),
        major=np.zeros(n, bool),
        failed=np.zeros(n, bool),
        new=np.full(n, -1),
    )
    vmas = VmaList([Vma(BASE, BASE + 64 * 4096, Prot(3))])
    order = sorted(end)
    runs = PageRuns.from_pages(
        np.array([BASE + 4096 * p for p in order], np.uint64), np.array([end[p] for p in order], np.uint32)
    )
    tasks = () if fork_at is None else (Task(3, fork_at, 1, 5, 5, "fork", (6, 6, 0, 2)),)
    return Facts(
        faults, (), tasks, {1: Snapshot(5, 0, vmas)}, {1: Snapshot(5, 1 << 40, vmas, runs)}, {"calls": False}
    )


OWN, ZERO = PageState.PRESENT, PageState.PRESENT | PageState.ZERO


@pytest.mark.parametrize(
    ("pages", "end", "causes"),
    [
        ([0], {0: OWN}, ["first-write"]),
        ([0], {0: ZERO}, ["first-read"]),
        ([0, 0], {0: OWN}, ["first-read", "zero-page-write"]),
        ([0, 1], {0: OWN, 1: ZERO}, ["first-write", "first-read"]),
    ],
)
def test_the_last_snapshot_tells(pages: list[int], end: dict[int, PageState], causes: list[str]) -> None:
    result = classify_facts(facts(pages, end))
    assert [result.of(i).cause for i in range(len(pages))] == causes
    assert {result.of(i).confidence for i in range(len(pages))} == {"likely"}


def test_without_the_page_at_the_end_it_stays_open() -> None:
    result = classify_facts(facts([0], {}))
    assert result.of(0).cause == "ambiguous"
    assert {"first-write", "first-read"} <= set(result.of(0).candidates)


def test_a_fork_between_leaves_it_open() -> None:
    result = classify_facts(facts([0, 0], {0: OWN}, fork_at=1500))
    assert [result.of(i).confidence for i in range(2)] != ["likely", "likely"]
    assert result.of(1).cause != "zero-page-write"


def test_memory_that_nobody_saw_being_mapped_has_candidates() -> None:
    # perf shows no mremap: the page lies where neither snapshot nor call mapped anything, and the fault was completed.
    given = facts([0, 100], {0: OWN})
    result = classify_facts(given)
    by_addr = {int(a): result.of(i) for i, a in enumerate(result.run.faults.addr.tolist())}
    verdict = by_addr[BASE + 100 * 4096]
    assert verdict.cause == "ambiguous"
    assert {"first-write", "first-read", "file-page-cached", "file-cow", "shared-page"} <= set(
        verdict.candidates
    )
    assert result.shares()[0] == 0


def test_a_second_fault_in_a_child_may_be_its_copy() -> None:
    # The child of a fork writes what its parent had: copy-on-write must be among the candidates, a race must not.
    given = facts([0, 0], {}, fork_at=1500)
    faults = given.faults
    mm = faults.mm.copy()
    mm[1] = 2
    columns = {name: getattr(faults, name) for name in faults.__dataclass_fields__}
    result = classify_facts(
        Facts(Faults(**(columns | {"mm": mm})), (), given.tasks, given.first, {}, {"calls": False})
    )
    row = result.run.faults.mm.tolist().index(2)
    assert result.of(row).cause == "ambiguous"
    assert set(result.of(row).candidates) == {"fork-cow-child", "zero-page-write", "after-dontneed"}


def test_another_thread_just_before_leaves_a_race_possible() -> None:
    given = facts([0, 0], {})
    faults = given.faults
    columns = {name: getattr(faults, name) for name in faults.__dataclass_fields__}
    other = Faults(**(columns | {"tid": np.array([5, 6])}))
    both = [
        classify_facts(Facts(f, (), (), given.first, {}, {"calls": False})).of(1) for f in (faults, other)
    ]
    assert set(both[0].candidates) == {"zero-page-write", "after-dontneed"}
    assert "spurious" in both[1].candidates
