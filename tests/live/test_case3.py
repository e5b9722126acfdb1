"""Case 3 on this kernel: each present page without a map count is found and named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pagelens.inspect import uncounted
from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from support.subjects import Subjects
from support.told import Told

pytestmark = pytest.mark.requires("pfn", "kpagecount", "kpageflags")


@dataclass
class Seen:
    where: dict[str, int]
    reasons: dict[int, str]
    hidden: dict[int, str]
    counted: int
    uncounted: int
    unknown: int


@pytest.fixture(scope="module")
def seen(subjects: Subjects) -> Seen:
    with Told(subjects("case3")) as subject:
        where = dict(
            zip(("zero", "huge", "ring", "written", "text"), subject.tell("where").split(), strict=True)
        )
        with Process.open(subject.pid) as proc:
            shot = snapshot.take(proc, frames=True)
            found, _ = regions.regions(proc, shot.vmas)
    rows = uncounted.find(shot, found)
    assert shot.pages is not None
    return Seen(
        {name: int(text, 16) for name, text in where.items()},
        {r.start + i * 4096: r.reason for r in rows for i in range(r.pages)},
        {r.start + i * 4096: r.label for r in uncounted.hidden(shot, found) for i in range(r.pages)},
        *uncounted.counted(shot.pages),
        sum(not r.known for r in rows),
    )


def test_zero_pages(seen: Seen) -> None:
    # Two loads, three pages apart, and nothing between them.
    found = [seen.reasons.get(seen.where["zero"] + i * 4096) for i in range(4)]
    assert found == ["zero page", None, None, "zero page"]


@pytest.mark.requires("thp")
def test_huge_zero_page(seen: Seen) -> None:
    found = [seen.reasons.get(seen.where["huge"] + i * 4096) for i in range(512)]
    assert found == ["huge zero page"] * 512


def test_counted_pages_are_not_listed(seen: Seen) -> None:
    for name in ("written", "text"):
        assert seen.where[name] not in seen.reasons
    assert seen.counted > 100
    assert seen.uncounted == len(seen.reasons)
    assert seen.unknown == 0


def test_frames_mapped_by_number_are_listed_apart(seen: Seen) -> None:
    """pagemap shows nothing in a VM_PFNMAP vma, so none of its pages may be called absent or uncounted."""
    assert not seen.hidden.keys() & seen.reasons.keys()
    ring = seen.where["ring"]
    if ring in seen.hidden:  # from 6.15 perf maps its ring by frame number; before, page by page with a count
        assert seen.hidden[ring] == "anon_inode:[perf_event]"
