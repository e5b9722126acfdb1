"""Split and merge: each rule by the vma list that the kernel leaves (mm/vma.c)."""

from __future__ import annotations

import pytest

from model.support import BASE, NONE, PAGE, PRIV, PROFILES, RW, R, anon, bits, maps, process


@pytest.mark.parametrize("profile", PROFILES)
def test_neighbours_with_equal_flags_become_one(profile: str) -> None:
    p = process(profile)
    anon(p, 2, page=0)
    anon(p, 2, page=4)
    assert maps(p) == [(0, 2, "rw-p"), (4, 2, "rw-p")]
    anon(p, 2, page=2)
    assert maps(p) == [(0, 6, "rw-p")]


@pytest.mark.parametrize("profile", PROFILES)
def test_munmap_in_the_middle_splits(profile: str) -> None:
    p = process(profile)
    anon(p, 6, page=0)
    assert p.munmap(BASE + 2 * PAGE, 2 * PAGE) == 0
    assert maps(p) == [(0, 2, "rw-p"), (4, 2, "rw-p")]


@pytest.mark.parametrize("profile", PROFILES)
def test_mprotect_of_the_middle_never_merges_and_of_an_edge_does(profile: str) -> None:
    p = process(profile)
    anon(p, 6, page=0)
    assert p.mprotect(BASE + 2 * PAGE, 2 * PAGE, NONE) == 0
    assert maps(p) == [(0, 2, "rw-p"), (2, 2, "---p"), (4, 2, "rw-p")]
    # The last page of the middle area moves over to its right neighbour; both sides then meet.
    assert p.mprotect(BASE + 3 * PAGE, PAGE, RW) == 0
    assert maps(p) == [(0, 2, "rw-p"), (2, 1, "---p"), (3, 3, "rw-p")]
    assert p.mprotect(BASE + 2 * PAGE, PAGE, RW) == 0
    assert maps(p) == [(0, 6, "rw-p")]


@pytest.mark.parametrize(
    ("profile", "merged"),
    [("linux-6.1", False), ("linux-6.12", False), ("linux-6.18", True), ("linux-7.2", True)],
)
def test_faulted_range_merges_into_an_unfaulted_neighbour_from_6_16(profile: str, merged: bool) -> None:
    # list_is_singular(empty chain) is false; vma_is_fork_child asks the other way round.
    p = process(profile)
    anon(p, 2, page=0)
    anon(p, 2, NONE, page=2)
    p.mprotect(BASE + 2 * PAGE, 2 * PAGE, R)  # differs, so that the fault finds no neighbour's anon_vma
    p.madvise(BASE + 2 * PAGE, 2 * PAGE, 1)  # MADV_RANDOM: incompatible beyond access flags
    p.mprotect(BASE + 2 * PAGE, 2 * PAGE, RW)
    assert p.access(BASE + 2 * PAGE, PAGE, "w").minor == 1
    p.madvise(BASE + 2 * PAGE, 2 * PAGE, 0)
    assert maps(p) == ([(0, 4, "rw-p")] if merged else [(0, 2, "rw-p"), (2, 2, "rw-p")])


@pytest.mark.parametrize("profile", PROFILES)
def test_unfaulted_range_merges_into_a_faulted_neighbour(profile: str) -> None:
    p = process(profile)
    anon(p, 2, page=0)
    p.access(BASE, 2 * PAGE, "w")
    anon(p, 2, page=2)
    assert maps(p) == [(0, 4, "rw-p")]


@pytest.mark.parametrize("profile", PROFILES)
def test_fork_child_does_not_merge_new_memory_into_what_it_inherited(profile: str) -> None:
    p = process(profile)
    anon(p, 2, page=0)
    p.access(BASE, 2 * PAGE, "w")
    child = p.fork()
    anon(child, 2, page=2)
    anon(p, 2, page=2)
    assert maps(child) == [(0, 2, "rw-p"), (2, 2, "rw-p")]
    assert maps(p) == [(0, 4, "rw-p")]


def _two_faulted_with_a_hole(profile: str) -> list[tuple[int, int, str]]:
    p = process(profile)
    anon(p, 2, page=0)
    anon(p, 2, page=4)
    p.access(BASE, PAGE, "w")
    p.access(BASE + 4 * PAGE, PAGE, "w")  # no neighbour touches: an anon_vma of its own
    anon(p, 2, page=2)
    return maps(p)


def test_between_two_anon_vmas_new_memory_goes_left_and_on_6_1_right() -> None:
    for profile in ("linux-6.12", "linux-6.18", "linux-7.2"):
        assert _two_faulted_with_a_hole(profile) == [(0, 4, "rw-p"), (4, 2, "rw-p")]
    assert _two_faulted_with_a_hole("linux-6.1") == [(0, 2, "rw-p"), (2, 4, "rw-p")]


@pytest.mark.parametrize("profile", PROFILES)
def test_account_flag_stays_on_6_1_and_goes_later(profile: str) -> None:
    # mprotect_fixup: RW to R on an unfaulted anonymous vma drops VM_ACCOUNT, except in 6.1.
    p = process(profile)
    anon(p, 2, RW, page=0)
    anon(p, 2, R, page=2)
    p.mprotect(BASE, 2 * PAGE, R)
    one = profile != "linux-6.1"
    assert maps(p) == ([(0, 4, "r--p")] if one else [(0, 2, "r--p"), (2, 2, "r--p")])


@pytest.mark.parametrize("profile", PROFILES)
def test_map_stack_does_not_merge_from_6_7(profile: str) -> None:
    p = process(profile)
    anon(p, 2, page=0)
    anon(p, 2, page=2, flags=0x2_0000)
    merged = profile == "linux-6.1"
    assert maps(p) == ([(0, 4, "rw-p")] if merged else [(0, 2, "rw-p"), (2, 2, "rw-p")])


@pytest.mark.parametrize(
    ("profile", "dirty"), [("linux-6.1", 25_601), ("linux-6.12", 0), ("linux-6.18", 0), ("linux-7.2", 0)]
)
def test_case_1_the_thread_that_dirtied_100_mb(profile: str, dirty: int) -> None:
    # glibc: malloc(100 MiB) maps 25,601 pages; a thread's stack is mmap(NONE, MAP_STACK) of 8 MiB and a guard
    # page, made writable above the guard. Both are placed top-down, so the stack lies right below.
    p = process(profile)
    chunk = p.mmap(0, 25_601 * PAGE, RW, PRIV)
    assert p.access(chunk, 25_601 * PAGE, "w").minor == 25_601
    assert p.clear_refs(4) == 0
    assert bits(p, chunk, 25_601, 55) == 0
    before = p.min_flt

    def new_thread() -> int:
        stack = p.mmap(0, 2049 * PAGE, NONE, PRIV | 0x2_0000)
        assert p.mprotect(stack + PAGE, 2048 * PAGE, RW) == 0
        return stack

    stack = new_thread()
    assert stack + 2049 * PAGE == chunk
    assert bits(p, chunk, 25_601, 55) == dirty
    # Then 20 MiB are written, all is cleared, and a second thread comes: its guard page keeps it apart.
    p.access(chunk, 5120 * PAGE, "w")
    p.clear_refs(4)
    new_thread()
    assert bits(p, chunk, 25_601, 55) == 0
    assert p.min_flt - before == 5120  # the write faults after the clear; creating threads faults nothing in
    p.access(chunk, 5120 * PAGE, "w")
    assert bits(p, chunk, 25_601, 55) == 5120
    p.mm.machine.check()


def test_sticky_soft_dirty_on_7_2() -> None:
    # VMA_STICKY_FLAGS: what merges by mprotect stays soft-dirty if any part was; before, the changed part's
    # flag is that of all.
    for profile, dirty in (("linux-6.12", 0), ("linux-7.2", 4)):
        p = process(profile)
        anon(p, 2, R, page=0)
        p.clear_refs(4)
        anon(p, 2, RW, page=2)
        assert bits(p, BASE, 4, 55) == 2
        p.mprotect(BASE, 2 * PAGE, RW)  # the clean part merges into the dirty one
        assert bits(p, BASE, 4, 55) == dirty, profile


def test_split_fails_at_the_vma_limit_and_mmap_above_it() -> None:
    p = process()
    p.machine.max_map_count = 3
    anon(p, 2, page=0)
    anon(p, 2, page=4)
    anon(p, 2, page=8)
    assert p.mprotect(BASE + PAGE, PAGE, R) == -12
    assert p.munmap(BASE, PAGE) == 0  # no new vma
    anon(p, 1, R, page=20)
    assert p.mmap(BASE + 30 * PAGE, PAGE, RW, PRIV | 0x10) == -12
    assert p.munmap(BASE + 20 * PAGE, PAGE) == 0
