"""PageRuns: columns, cuts and joins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagelens.vm import PAGE_SIZE, AddrRange, PageRuns, PageState, Prot, UsageError, Vma, VmaList
from pagelens.vm.pages import distinct
from pagelens.vm.units import parse_size

pages = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), unique_by=lambda p: p[0]).map(sorted)


def runs_of(content: list[tuple[int, int]]) -> PageRuns:
    addr = np.array([p * PAGE_SIZE for p, _ in content], dtype=np.uint64)
    state = np.array([s for _, s in content], dtype=np.uint32)
    pfn = np.array([1000 + p for p, _ in content], dtype=np.uint64)
    return PageRuns.from_pages(addr, state, pfn=pfn)


@given(pages)
def test_runs_hold_exactly_the_pages_given(content: list[tuple[int, int]]) -> None:
    runs = runs_of(content)
    assert runs.addresses().tolist() == [p * PAGE_SIZE for p, _ in content]
    assert runs.states().tolist() == [s for _, s in content]
    assert runs.pages == len(content)


@given(pages, st.integers(0, 60), st.integers(1, 30))
def test_clipping_keeps_pages_and_their_frames(
    content: list[tuple[int, int]], first: int, count: int
) -> None:
    cut = runs_of(content).clipped(first * PAGE_SIZE, (first + count) * PAGE_SIZE)
    want = [(p, s) for p, s in content if first <= p < first + count]
    assert cut.addresses().tolist() == [p * PAGE_SIZE for p, _ in want]
    assert cut.states().tolist() == [s for _, s in want]
    if want:
        assert cut.pfn is not None
        assert cut.pfn.tolist() == [1000 + p for p, _ in want]


@given(pages)
def test_where_selects_by_bits(content: list[tuple[int, int]]) -> None:
    runs = runs_of(content)
    chosen = runs.where(PageState.PRESENT, without=PageState.SWAPPED)
    assert chosen.addresses().tolist() == [p * PAGE_SIZE for p, s in content if s & 1 and not s & 2]
    assert runs.count_where(PageState.PRESENT, PageState.SWAPPED) == chosen.pages


def test_vma_list_finds_only_what_is_mapped() -> None:
    vmas = VmaList([Vma(0x3000, 0x5000, Prot.READ), Vma(0x1000, 0x2000, Prot.NONE)])
    assert [v.start for v in vmas] == [0x1000, 0x3000]
    found = vmas.find_many(np.array([0, 0x1000, 0x1FFF, 0x2000, 0x4FFF, 0x5000], dtype=np.uint64))
    assert found.tolist() == [-1, 0, 0, -1, 1, -1]
    assert vmas.find(0x2000) is None
    hit = vmas.find(0x4000)
    assert hit is not None and hit.perms == "r--p"


@pytest.mark.parametrize(
    "text", ["", "1000", "2000-1000", "1000-1000", "zz-ff", "ffff888000000000-ffff888000001000"]
)
def test_bad_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        AddrRange.parse(text)


def test_ranges_and_sizes_parse() -> None:
    assert AddrRange.parse("0x1000+8k") == AddrRange(0x1000, 0x3000)
    assert AddrRange.parse("1000-2fff").pages == 2
    assert parse_size("1.5M") == 1536 * 1024


def test_distinct() -> None:
    assert distinct(np.array([3, 1, 3, 2, 1], np.uint64)).tolist() == [1, 2, 3]
    assert distinct(np.empty(0, np.int64)).tolist() == []
