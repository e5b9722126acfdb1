"""mremap: shrink, grow in place, move, DONTUNMAP, several areas at once."""

from __future__ import annotations

import pytest

from model.support import BASE, PAGE, PROFILES, RW, R, anon, bits, maps, process

MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4
PRESENT, SOFT = 63, 55


@pytest.mark.parametrize("profile", PROFILES)
def test_shrink_and_grow_in_place(profile: str) -> None:
    p = process(profile)
    a = anon(p, 8, page=0)
    p.access(a, 8 * PAGE, "w")
    assert p.mremap(a, 8 * PAGE, 3 * PAGE, 0) == a
    assert (maps(p), p.mm.rss) == ([(0, 3, "rw-p")], 3)
    assert p.mremap(a, 3 * PAGE, 6 * PAGE, 0) == a
    assert maps(p) == [(0, 6, "rw-p")]
    anon(p, 1, R, page=6)
    assert p.mremap(a, 6 * PAGE, 7 * PAGE, 0) == -12
    assert p.mremap(a, 2 * PAGE, 3 * PAGE, 0) == -12  # the range does not end with the area
    assert p.machine.committed == p.mm.data_vm


@pytest.mark.parametrize("profile", PROFILES)
def test_move_takes_the_pages_along_without_a_fault_and_soft_dirty(profile: str) -> None:
    p = process(profile)
    a = anon(p, 4, page=0)
    p.access(a, 3 * PAGE, "w")
    p.clear_refs(4)
    b = BASE + 100 * PAGE
    assert p.mremap(a, 4 * PAGE, 6 * PAGE, MAYMOVE | FIXED, b) == b
    assert maps(p) == [(100, 6, "rw-p")]
    assert (bits(p, b, 6, PRESENT), bits(p, b, 6, SOFT), p.mm.rss) == (3, 3, 3)
    assert p.min_flt == 3
    assert (p.mm.total_vm, p.machine.committed) == (6, 6)
    # The offset stays that of the old place, so a new neighbour below does not merge.
    anon(p, 1, page=99)
    assert maps(p) == [(99, 1, "rw-p"), (100, 6, "rw-p")]
    p.machine.check()


@pytest.mark.parametrize("profile", PROFILES)
def test_unfaulted_memory_takes_the_offset_of_its_new_place_and_merges(profile: str) -> None:
    p = process(profile)
    anon(p, 2, page=0)
    anon(p, 2, page=50)
    assert p.mremap(BASE, 2 * PAGE, 2 * PAGE, MAYMOVE | FIXED, BASE + 52 * PAGE) == BASE + 52 * PAGE
    assert maps(p) == [(50, 4, "rw-p")]


@pytest.mark.parametrize("profile", PROFILES)
def test_dontunmap_leaves_an_empty_area(profile: str) -> None:
    p = process(profile)
    a = anon(p, 4, page=0)
    p.access(a, 4 * PAGE, "w")
    b = p.mremap(a, 4 * PAGE, 4 * PAGE, MAYMOVE | DONTUNMAP, BASE + 100 * PAGE)
    assert b == BASE + 100 * PAGE
    assert maps(p) == [(0, 4, "rw-p"), (100, 4, "rw-p")]
    assert (bits(p, a, 4, PRESENT), bits(p, b, 4, PRESENT), p.mm.total_vm) == (0, 4, 8)
    assert p.access(a, 4 * PAGE, "w").minor == 4
    p.machine.check()


def test_a_move_lands_in_the_highest_gap_and_whole_tables_move_as_they_are() -> None:
    p = process()
    a = anon(p, 1024, page=0)
    p.access(a, 1024 * PAGE, "w")
    p.clear_refs(4)
    anon(p, 1, R, page=1024)
    b = p.mremap(a, 1024 * PAGE, 2048 * PAGE, MAYMOVE)
    assert b % (2 << 20) == 0
    assert (bits(p, b, 1024, PRESENT), bits(p, b, 1024, SOFT)) == (1024, 0)
    # Two tables moved; the levels above them are there twice, because a neighbour still needs the old ones.
    assert p.mm.tables.bytes >> 12 == 2 + 2 + 2


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((0, 4, 4, 8, 0), -22),
        ((0, 4, 0, MAYMOVE, 0), -22),
        ((0, 4, 4, FIXED, 100), -22),
        ((0, 4, 4, MAYMOVE | FIXED, 2), -22),  # overlap
        ((0, 4, 5, MAYMOVE | DONTUNMAP, 100), -22),
        ((0, 0, 4, MAYMOVE, 0), -22),  # duplicate of private memory
        ((0, 9, 10, MAYMOVE, 0), -14),  # beyond the area
        ((50, 1, 2, MAYMOVE, 0), -14),
    ],
)
@pytest.mark.parametrize("profile", PROFILES)
def test_errors(profile: str, args: tuple[int, int, int, int, int], error: int) -> None:
    p = process(profile)
    anon(p, 4, page=0)
    old, old_pages, new_pages, flags, new = args
    got = p.mremap(BASE + old * PAGE, old_pages * PAGE, new_pages * PAGE, flags, BASE + new * PAGE)
    assert got == error


def test_old_length_zero_duplicates_a_shared_mapping() -> None:
    p = process()
    a = p.mmap(0, 4 * PAGE, RW, 0x21)
    p.access(a, 4 * PAGE, "w")
    b = p.mremap(a, 0, 4 * PAGE, MAYMOVE)
    assert b > 0 and b != a
    assert p.access(b, 4 * PAGE, "r").minor == 1  # fault-around finds all four
    assert p.machine.frames.used == 4


def test_several_areas_move_at_once_from_6_17() -> None:
    for profile, expected in (("linux-6.12", -14), ("linux-6.18", BASE + 100 * PAGE)):
        p = process(profile)
        anon(p, 2, page=0)
        anon(p, 2, R, page=2)
        anon(p, 2, page=6)
        assert p.mremap(BASE, 8 * PAGE, 8 * PAGE, MAYMOVE | FIXED, BASE + 100 * PAGE) == expected, profile
    assert maps(p) == [(100, 2, "rw-p"), (102, 2, "r--p"), (106, 2, "rw-p")]


def test_a_failing_move_to_a_fixed_place_unmaps_it_first_before_6_17() -> None:
    for profile, left in (("linux-6.12", 1), ("linux-6.18", 2)):
        p = process(profile)
        anon(p, 2, page=0)
        anon(p, 2, R, page=100)
        got = p.mremap(BASE, 4 * PAGE, 5 * PAGE, MAYMOVE | FIXED, BASE + 100 * PAGE)
        assert (got, len(maps(p))) == (-14, left), profile


def test_locked_growth_is_populated() -> None:
    p = process()
    a = anon(p, 2, page=0)
    p.mlock(a, 2 * PAGE)
    assert p.mremap(a, 2 * PAGE, 5 * PAGE, 0) == a
    assert (p.mm.rss, p.mm.locked_vm) == (5, 5)
    assert p.mremap(a, 5 * PAGE, 5 * PAGE, MAYMOVE | FIXED, BASE + 64 * PAGE) > 0
    assert (p.mm.rss, p.mm.locked_vm, p.mm.total_vm) == (5, 5, 5)


def test_a_move_that_keeps_its_place_in_the_table_moves_tables_whole_from_6_7() -> None:
    for profile, marked in (("linux-6.1", 412 + 100), ("linux-6.12", 100)):
        p = process(profile)
        a = anon(p, 1024, page=100)
        p.access(a, 1024 * PAGE, "w")
        p.clear_refs(4)
        b = BASE + (4 * 512 + 100) * PAGE
        assert p.mremap(a, 1024 * PAGE, 1024 * PAGE, MAYMOVE | FIXED, b) == b
        assert (bits(p, b, 1024, PRESENT), bits(p, b, 1024, SOFT)) == (1024, marked), profile
        p.machine.check()
