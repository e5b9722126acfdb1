"""Placement, limits and brk: addresses and error numbers as the kernel gives them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.support import BASE, NONE, PAGE, PRIV, PROFILES, RW, R, anon, maps, process
from pagelens.model import Layout, Limits, Machine
from pagelens.model.area import Area, AreaTree

TOP = Layout().mmap_base
MB2 = 2 << 20


@pytest.mark.parametrize("profile", PROFILES)
def test_top_down_and_into_the_highest_gap_that_fits(profile: str) -> None:
    p = process(profile)
    a, b, c = anon(p, 4, R), anon(p, 2, RW), anon(p, 4, R)
    assert (a, b, c) == (TOP - 4 * PAGE, TOP - 6 * PAGE, TOP - 10 * PAGE)
    p.munmap(b, 2 * PAGE)
    assert anon(p, 3, RW) == TOP - 13 * PAGE
    assert anon(p, 1, RW) == TOP - 5 * PAGE  # the upper page of the gap


@pytest.mark.parametrize("profile", PROFILES)
def test_hint_is_taken_if_free_else_ignored(profile: str) -> None:
    p = process(profile)
    assert anon(p, 2, at=BASE + 123) == BASE
    assert anon(p, 2, at=BASE + PAGE) == TOP - 2 * PAGE
    assert anon(p, 2, at=0x1000) == 0x10000  # round_hint_to_min
    assert p.mmap(BASE, PAGE, RW, PRIV | 0x10_0000) == -17  # MAP_FIXED_NOREPLACE
    assert p.mmap(BASE + 1, PAGE, RW, PRIV | 0x10) == -22


def test_multiples_of_2_mib_are_aligned_from_6_7() -> None:
    for profile, expected in (
        ("linux-6.1", TOP - PAGE - MB2),
        ("linux-6.12", (TOP - PAGE - MB2) & ~(MB2 - 1)),
        ("linux-6.18", (TOP - PAGE - MB2) & ~(MB2 - 1)),
    ):
        p = process(profile)
        anon(p, 1, R)
        assert anon(p, 512) == expected, profile
        assert anon(p, 513) % MB2 or profile == "linux-6.1"


def test_6_12_aligns_files_without_a_method_of_their_own_as_well() -> None:
    for profile, aligned in (("linux-6.1", False), ("linux-6.12", True), ("linux-6.18", False)):
        p = process(profile)
        f = p.machine.file("/plain", MB2)
        anon(p, 1, R)
        assert (p.mmap(0, MB2, R, 2, f) % MB2 == 0) is aligned, profile
        f.thp_align = True  # ext4 and others always do
        assert p.mmap(0, MB2, R, 2, f) % MB2 == 0
        p = process(profile)
        anon(p, 1, R)
        mem = p.memfd_create("m")
        mem.ftruncate(MB2)
        assert p.mmap(0, MB2, R, 2, mem) == TOP - PAGE - MB2


def test_stack_guard_gap_keeps_placement_away() -> None:
    p = process()
    a = anon(p, 1, flags=0x100)  # MAP_GROWSDOWN
    assert anon(p, 1) == a - 257 * PAGE
    assert p.mmap(a - 200 * PAGE, PAGE, RW, PRIV) == a - 258 * PAGE  # the hint lies in the gap
    assert p.mmap(a - 200 * PAGE, PAGE, RW, PRIV | 0x10) == a - 200 * PAGE  # MAP_FIXED may


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((0, 0, RW, PRIV), -22),
        ((0, (1 << 64) - 1, RW, PRIV), -12),
        ((0, 1 << 47, RW, PRIV), -12),
        ((0, PAGE, RW, 0x20), -22),  # neither shared nor private
        ((0, PAGE, RW, 2), -9),  # no file
        ((0, PAGE, RW, 0x121), -22),  # shared and growing down
    ],
)
def test_mmap_errors(args: tuple[int, int, int, int], error: int) -> None:
    assert process().mmap(*args) == error


@pytest.mark.parametrize(
    ("addr", "length", "error"), [(1, PAGE, -22), (BASE, 0, -22), (BASE, PAGE, 0), (1 << 48, PAGE, -22)]
)
def test_munmap_errors_and_holes(addr: int, length: int, error: int) -> None:
    assert process().munmap(addr, length) == error


def test_mprotect_over_a_hole_does_the_first_part() -> None:
    p = process()
    anon(p, 2, page=0)
    anon(p, 2, page=3)
    assert p.mprotect(BASE, 5 * PAGE, R) == -12
    assert maps(p) == [(0, 2, "r--p"), (3, 2, "rw-p")]
    assert p.mprotect(BASE, 0, R) == 0
    assert p.mprotect(BASE, PAGE, 0x10) == -22
    assert p.mprotect(BASE + 2 * PAGE, PAGE, R) == -12


def test_limits_as_data_memlock() -> None:
    limits = Limits(address_space=20 * PAGE, data=10 * PAGE, memlock=4 * PAGE, cap_ipc_lock=False)
    p = Machine("linux-6.18").spawn(limits=limits)
    a = anon(p, 8, page=0)
    assert p.mmap(0, 3 * PAGE, RW, PRIV) == -12  # RLIMIT_DATA
    b = anon(p, 4, R, page=20)
    assert p.mprotect(b, 4 * PAGE, RW) == -12
    anon(p, 4, R, page=30)
    assert p.mmap(0, 5 * PAGE, R, PRIV) == -12  # RLIMIT_AS
    assert p.mmap(a, 8 * PAGE, RW, PRIV | 0x10) == a  # replaces as much as it adds
    assert p.mlock(a, 5 * PAGE) == -12
    assert p.mlock(a, 4 * PAGE) == 0
    assert p.mlock(a, 2 * PAGE) == 0  # already counted
    assert p.mmap(0, PAGE, R, PRIV | 0x2000) == -11
    assert p.mlockall(1) == -12
    assert p.snapshot().accounting.status["VmLck"] == 4 * PAGE  # type: ignore[union-attr]


@pytest.mark.parametrize("profile", PROFILES)
def test_brk_in_four_steps(profile: str) -> None:
    p = process(profile)
    start = p.brk(0)
    assert p.brk(start + 10) == start + 10
    assert p.brk(start + 5 * PAGE) == start + 5 * PAGE
    assert [(v.pages, v.name) for v in p.snapshot().vmas] == [(5, "[heap]")]
    assert p.access(start, 5 * PAGE, "w").minor == 5
    assert p.brk(start + 2 * PAGE) == start + 2 * PAGE
    assert p.mm.rss_anon == 2
    assert p.brk(start - 1) == start + 2 * PAGE  # below the start: the old break
    p.mmap(start + 10 * PAGE, PAGE, RW, PRIV | 0x10)
    assert p.brk(start + 10 * PAGE) == start + 2 * PAGE  # a page of distance is asked for
    assert p.brk(start + 9 * PAGE) == start + 9 * PAGE
    p.mlockall(2)
    before = p.min_flt
    assert p.brk(start + 7 * PAGE) == start + 7 * PAGE
    assert p.brk(start + 9 * PAGE) == start + 9 * PAGE
    assert p.min_flt - before == 2


def test_populate_counts_faults_without_events() -> None:
    p = process()
    anon(p, 64, flags=0x8000)
    assert (p.min_flt, p.machine.events.entries[-1].gup) == (64, 64)
    anon(p, 64, flags=0x1_8000)  # MAP_NONBLOCK: nothing
    assert p.min_flt == 64
    assert [e.kind for e in p.machine.events.entries] == ["syscall", "syscall"]


def test_overcommit_guess_refuses_only_the_obvious() -> None:
    p = Machine("linux-6.18", memory_pages=1000).spawn()
    assert p.mmap(0, 1001 * PAGE, RW, PRIV) == -12
    assert p.mmap(0, 1001 * PAGE, RW, PRIV | 0x4000) > 0
    assert p.mmap(0, 1001 * PAGE, NONE, PRIV) > 0
    for _ in range(5):
        assert p.mmap(0, 900 * PAGE, RW, PRIV) > 0
    assert p.machine.committed == 4500


class _Naive:
    """The same questions, by looking at every area."""

    def __init__(self) -> None:
        self.areas: list[Area] = []

    def highest_gap(self, low: int, high: int, length: int) -> int | None:
        edges = sorted((a.start, a.end) for a in self.areas)
        gaps = []
        last = 0
        for start, end in [*edges, (1 << 60, 1 << 60)]:
            gaps.append((max(last, low), min(start, high)))
            last = end
        tops = [top for bottom, top in gaps if top - bottom >= length]
        return max(tops) if tops else None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("iiird"), st.integers(1, 900), st.integers(1, 6)), max_size=300))
def test_the_tree_answers_as_a_plain_list_does(steps: list[tuple[str, int, int]]) -> None:
    tree, naive = AreaTree(), _Naive()
    for what, at, size in steps:
        start, end = at << 12, (at + size) << 12
        inside = [a for a in naive.areas if a.start < end and a.end > start]
        assert tree.overlapping(start, end) == sorted(inside, key=lambda a: a.start)
        if what == "i" and not inside:
            area = Area(start, end, 0, 0)
            tree.insert(area)
            naive.areas.append(area)
        elif what == "r" and inside:
            tree.remove(inside[0])
            naive.areas.remove(inside[0])
        elif what == "d" and inside and inside[0].pages > 1:
            tree.resize(inside[0], inside[0].start + PAGE, inside[0].end, 0)
        for length in (1, size):
            gap = tree.highest_gap(PAGE, 800 << 12, length << 12)
            assert (gap[0] if gap else None) == naive.highest_gap(PAGE, 800 << 12, length << 12)
        found = tree.find(start)
        above = [a for a in naive.areas if a.end > start]
        assert found is (min(above, key=lambda a: a.start) if above else None)
    assert [a.start for a in tree] == sorted(a.start for a in naive.areas)
    assert len(tree) == len(naive.areas)


def test_65_000_areas_are_placed_and_found() -> None:
    p = process()
    for i in range(65_000):
        p.mmap(0, PAGE, R if i & 1 else RW, PRIV)
    assert p.mm.map_count == 65_000
    assert p.mm.areas.find(0).start == TOP - 65_000 * PAGE  # type: ignore[union-attr]
    p.munmap(TOP - 40_000 * PAGE, PAGE)
    assert p.mmap(0, PAGE, NONE, PRIV) == TOP - 40_000 * PAGE


def test_when_nothing_is_left_below_the_base_placement_goes_upwards() -> None:
    p = Machine("linux-6.18").spawn(Layout(mmap_base=0x2_0000, mmap_legacy_base=0x3_0000))
    assert anon(p, 16, R) == 0x1_0000
    assert anon(p, 2) == 0x3_0000
    assert p.mmap(0x3_4000, PAGE, RW, PRIV | 0x110) == 0x3_4000  # a stack: 256 pages below it stay free
    assert anon(p, 1, R) == 0x3_5000
    assert p.mmap(0, PAGE, RW, PRIV | 0x40) == 0x4000_0000  # MAP_32BIT
