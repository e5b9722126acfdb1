"""A diff as text: what thousands of runs come to."""

from __future__ import annotations

from pagelens.report import transitions
from pagelens.report.diff import Diff, Moment, PageChange
from pagelens.report.difftext import as_text
from pagelens.vm.pages import PageRuns, PageState
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.vma import VmaList


def _run(number: int, pages: int, what: str, *, copied: bool, function: str) -> PageChange:
    change = PageChange(
        number << 20, pages, 1, 3, copied, "heap", "heap", False, {"Private_Dirty": 4096}, what
    )
    change.stores = [{"function": function, "faults": pages}]
    return change


def test_many_runs_in_short() -> None:
    shot = Snapshot(1, 0, VmaList([]), PageRuns.empty())
    side = Moment(shot, (), "x")
    runs = [_run(i, 1 + (i == 77), "copied", copied=True, function="f") for i in range(100)]
    runs.append(_run(200, 5, "mapped by somebody else too now", copied=False, function="g"))
    text = as_text(Diff(side, side, "address", [], [], runs, {}), explain=True, pages=2)
    assert "pages that changed: 106 in 101 runs" in text
    assert "     101 pages copied, first at f" in text
    assert "       5 pages mapped by somebody else too now, first at g" in text
    assert "the longest 2 of 101 runs" in text
    assert text.count(" heap: ") == 2
    assert "2 pages heap" in text and "5 pages heap" in text
    assert text.count("one page for another") == text.count("the same page, counted elsewhere") == 1
    assert "in short" not in as_text(Diff(side, side, "address", [], [], runs[:2], {}), pages=2)


def test_two_processes_are_compared_and_shared_memory_is_no_clean_file() -> None:
    file, own = int(PageState.PRESENT | PageState.FILE), int(PageState.PRESENT)
    assert transitions.compare(own, 0, copied=False) == "present in the first only"
    assert transitions.compare(0, own, copied=False) == "present in the second only"
    assert (
        transitions.compare(file, own, copied=False)
        == "the file's page in the first, a private copy in the other"
    )
    assert transitions.effect(0, file, memory=True) == {"Rss": 4096, "Shared_Dirty": 4096}
    assert transitions.describe(0, file, file_vma=False, memory=True) == "page of shared memory mapped"
