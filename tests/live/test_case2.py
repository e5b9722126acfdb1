"""Case 2 by `diff`, on this kernel: which store changed which field of smaps, read first and written
first."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pagelens.capture.reader import Capture
from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.report import moments, stores
from pagelens.report.diff import Diff, Moment, compare
from pagelens.report.difftext import as_text, names
from pagelens.vm.regions import Kind
from pagelens.vm.units import AddrRange
from support.subjects import SOURCES, Subjects
from support.told import Told

K = 1024
FIELDS = ("Rss", "Private_Clean", "Private_Dirty", "Anonymous")
RUNS = {
    "read first": ("forget data", "read data", "write data", "read bss", "write bss"),
    "written first": ("forget data", "write data", "write bss"),
}
TEXT = (SOURCES / "case2.c").read_text().splitlines()
pytestmark = pytest.mark.requires("root", "bpf", "libbpf", "perf-system")


def line_of(comment: str) -> int:
    return next(i for i, text in enumerate(TEXT, 1) if comment in text)


def look(pid: int) -> Moment:
    with Process.open(pid) as proc:
        shot = snapshot.take(proc)
        return Moment(shot, regions.regions(proc, shot.vmas)[0], str(pid))


@pytest.fixture(scope="module")
def diffs(subjects: Subjects, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Diff]:
    """(run, command) -> what the command changed in its vma, with the stores."""
    out = {}
    # In the page cache when it starts, or nothing tells what a read mapped around.
    subjects("case2").read_bytes()
    for run, commands in RUNS.items():
        path: Path = tmp_path_factory.mktemp("case2") / "case2.plens"
        with Told(subjects("case2"), path) as subject:
            seen = [("", look(subject.pid))]
            for command in commands:
                subject.tell(command)
                seen.append((command, look(subject.pid)))
            subject.finish()
        capture = Capture(path)
        for (_, before), (command, after) in itertools.pairwise(seen):
            kind = Kind.DATA if command.endswith("data") else Kind.BSS
            region = next(r for r in after.regions if r.kind is kind and "case2" in r.label)
            diff = compare(before, after, where=AddrRange(region.start, region.end))
            stores.attribute(diff, capture, moments.main_mm(capture))
            out[run, command] = diff
    return out


def changes(diff: Diff) -> dict[str, int]:
    return {r["field"]: r["change"] for r in diff.fields if r["field"] in FIELDS}


def test_read_then_written(diffs: dict[tuple[str, str], Diff]) -> None:
    read, write = diffs["read first", "read data"], diffs["read first", "write data"]
    assert changes(read) == {"Rss": 4 * K, "Private_Clean": 4 * K}
    (page,) = read.pages
    assert names(page.after) == ["present", "file", "exclusive"]
    # The question's own figures: clean 4 to 0, dirty and anonymous 4 more, Rss unchanged.
    assert next((r["before"], r["after"]) for r in write.fields if r["field"] == "Private_Clean") == (
        4 * K,
        0,
    )
    assert changes(write) == {"Private_Clean": -4 * K, "Private_Dirty": 4 * K, "Anonymous": 4 * K}
    (page,) = write.pages
    assert (page.symbol, page.pages, page.faults) == ("initialised", 1, 1)
    # It had been mapped around another fault, until the subject gave it away.
    before, then = page.chain[-2:]
    assert (before["what"], before["between"], before["cause"]) == ("read, no page", False, "after-dontneed")
    assert (then["what"], then["between"], then["cause"]) == ("write, page present", True, "file-cow")
    assert [(s["function"], s["line"]) for s in page.stores] == [
        ("main", line_of("the store to the data page"))
    ]
    assert "Rss stays" in page.what
    assert all(part == whole for part, whole in write.explained.values())
    assert "(Rss stays: one page for another)" in as_text(write, explain=True)


def test_written_first(diffs: dict[tuple[str, str], Diff]) -> None:
    write = diffs["written first", "write data"]
    assert changes(write) == {"Rss": 4 * K, "Private_Dirty": 4 * K, "Anonymous": 4 * K}
    (page,) = write.pages
    assert page.chain[-1]["what"] == "write, no page"
    assert "copied straight from the file" in page.what


def test_bss(diffs: dict[tuple[str, str], Diff]) -> None:
    read, write = diffs["read first", "read bss"], diffs["read first", "write bss"]
    assert changes(read) == {}  # the zero page is in no field
    assert names(read.pages[0].after) == ["present", "zero"]
    assert changes(write) == {"Rss": 4 * K, "Private_Dirty": 4 * K, "Anonymous": 4 * K}
    assert [r["what"] for r in write.pages[0].chain] == ["read, no page", "write, page present"]
    assert write.pages[0].symbol == "uninitialised"
    first = diffs["written first", "write bss"]
    assert changes(first) == changes(write)
    assert [r["what"] for r in first.pages[0].chain] == ["write, no page"]
