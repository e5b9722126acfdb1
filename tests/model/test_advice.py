"""madvise, mlock, msync, clear_refs: CASES 6 and their error numbers."""

from __future__ import annotations

import pytest

from model.support import BASE, NONE, PAGE, PROFILES, RW, R, anon, bits, maps, process, smaps

PRESENT, SOFT = 63, 55
DONTNEED, FREE, PAGEOUT, COLD = 4, 8, 21, 20


@pytest.mark.parametrize("profile", PROFILES)
def test_dontneed_drops_the_data_and_keeps_the_range(profile: str) -> None:
    p = process(profile)
    a = anon(p, 8)
    p.access(a, 8 * PAGE, "w")
    assert p.madvise(a + 2 * PAGE, 4 * PAGE, DONTNEED) == 0
    assert (bits(p, a, 8, PRESENT), p.mm.rss_anon, p.machine.frames.used) == (4, 4, 4)
    assert len(maps(p, 0)) == 1
    assert p.access(a, 8 * PAGE, "r").minor == 4
    assert smaps(p, a)["Rss"] == 16


def test_free_keeps_the_pages_until_pressure_and_a_write_takes_them_back() -> None:
    p = process()
    a = anon(p, 8)
    p.access(a, 8 * PAGE, "w")
    assert p.madvise(a, 8 * PAGE, FREE) == 0
    s = smaps(p, a)
    assert (s["Rss"], s["Private_Clean"], s["Private_Dirty"], s["LazyFree"]) == (32, 32, 0, 32)
    assert p.access(a, 2 * PAGE, "w").faults == []  # the write bit stayed
    assert smaps(p, a)["LazyFree"] == 24
    assert p.madvise(a, 8 * PAGE, PAGEOUT) == 0
    assert bits(p, a, 8, PRESENT) == 2
    assert p.access(a, 8 * PAGE, "r").minor == 6
    assert p.madvise(p.mmap(0, PAGE, RW, 0x21), PAGE, FREE) == -22


def test_pageout_without_swap_takes_clean_cache_pages_mapped_once() -> None:
    p = process()
    f = p.machine.file("/f", 4 * PAGE)
    a = p.mmap(0, 4 * PAGE, RW, 2, f)
    p.access(a, 4 * PAGE, "r")
    p.access(a, PAGE, "w")
    p.madvise(a, 4 * PAGE, PAGEOUT)
    assert (bits(p, a, 4, PRESENT), sorted(f.pages)) == (1, [0])
    assert p.access(a, 4 * PAGE, "r").major == 3
    b = anon(p, 2)
    p.access(b, 2 * PAGE, "w")
    p.madvise(b, 2 * PAGE, COLD)
    assert (smaps(p, b)["Referenced"], smaps(p, b)["Rss"]) == (0, 8)


def test_holes_are_skipped_and_told() -> None:
    p = process()
    anon(p, 2, page=0)
    anon(p, 2, page=4)
    p.access(BASE, 2 * PAGE, "w")
    p.access(BASE + 4 * PAGE, 2 * PAGE, "w")
    assert p.madvise(BASE, 6 * PAGE, DONTNEED) == -12
    assert p.mm.rss == 0
    assert p.madvise(BASE + 8 * PAGE, PAGE, DONTNEED) == -12
    assert p.madvise(BASE + 1, PAGE, DONTNEED) == -22
    assert p.madvise(BASE, 0, DONTNEED) == 0
    assert p.madvise(BASE, PAGE, 77) == -22


def test_populate_stops_at_a_hole_from_6_10() -> None:
    for profile, pages in (("linux-6.1", 4), ("linux-6.12", 2)):
        p = process(profile)
        anon(p, 2, page=0)
        anon(p, 2, page=4)
        assert p.madvise(BASE, 6 * PAGE, 23) == -12
        assert p.mm.rss == pages, profile
    p = process()
    assert p.madvise(anon(p, 2, R), 2 * PAGE, 23) == -22
    assert p.madvise(anon(p, 2, NONE), 2 * PAGE, 22) == -22
    a = anon(p, 2)
    assert p.madvise(a, 2 * PAGE, 22) == 0
    assert (p.min_flt, p.mm.rss) == (2, 0)  # zero pages


def test_flags_split_and_merge_back() -> None:
    p = process()
    a = anon(p, 4, page=0)
    assert p.madvise(a + PAGE, PAGE, 10) == 0
    assert maps(p) == [(0, 1, "rw-p"), (1, 1, "rw-p"), (2, 2, "rw-p")]
    assert p.madvise(a, 4 * PAGE, 11) == 0
    assert maps(p) == [(0, 4, "rw-p")]
    for advice, code in ((12, "mg"), (14, "hg"), (15, "nh"), (16, "dd"), (1, "rr"), (2, "sr")):
        assert p.madvise(a, 4 * PAGE, advice) == 0
        assert code in (p.snapshot().vmas[0].vm_flags or ())
    assert process("linux-6.18", thp=False).madvise(a, 4 * PAGE, 14) == -22


@pytest.mark.parametrize("profile", PROFILES)
def test_remove_punches_a_hole_for_everyone(profile: str) -> None:
    p = process(profile)
    f = p.memfd_create("f")
    f.ftruncate(4 * PAGE)
    a, b = p.mmap(0, 4 * PAGE, RW, 1, f), p.mmap(0, 4 * PAGE, R, 1, f)
    c = p.mmap(0, 4 * PAGE, RW, 2, f)
    for addr, kind in ((a, "w"), (b, "r"), (c, "w")):
        p.access(addr, 4 * PAGE, kind)
    assert p.madvise(a, 2 * PAGE, 9) == 0
    assert [bits(p, x, 4, PRESENT) for x in (a, b, c)] == [2, 2, 4]  # copies stay
    assert p.madvise(b, 2 * PAGE, 9) == 0  # it may become writable, that is enough
    assert p.madvise(c, PAGE, 9) == -13
    assert p.madvise(anon(p, 1), PAGE, 9) == -22


@pytest.mark.parametrize("profile", PROFILES)
def test_mlock_populates_as_a_write_where_it_may(profile: str) -> None:
    p = process(profile)
    a = anon(p, 8)
    p.access(a, 8 * PAGE, "r")
    assert p.mlock(a + 100, 4 * PAGE) == 0  # rounded outwards
    assert (p.mm.rss_anon, p.mm.locked_vm) == (5, 5)
    assert p.access(a, 5 * PAGE, "w").faults == []
    assert smaps(p, a)["Locked"] == 20
    assert p.munlock(a, 5 * PAGE) == 0
    # The written part has an anon_vma, the rest not: to 6.12 they stay apart.
    apart = profile in ("linux-6.1", "linux-6.12")
    assert (len(maps(p, 0)), p.mm.locked_vm) == (2 if apart else 1, 0)
    ro = anon(p, 4, R)
    assert p.mlock(ro, 4 * PAGE) == 0
    assert p.mm.rss_anon == 5  # zero pages only
    assert p.mlock2(anon(p, 4), 4 * PAGE, 1) == 0
    assert (p.mm.rss_anon, p.mm.locked_vm) == (5, 8)
    assert p.mlock(anon(p, 1, NONE), PAGE) == -12
    assert p.mlock2(a, PAGE, 2) == -22
    assert p.madvise(ro, PAGE, DONTNEED) == -22
    assert p.madvise(ro, PAGE, 24) == 0  # MADV_DONTNEED_LOCKED


def test_mlockall_current_future_onfault() -> None:
    p = process()
    a = anon(p, 4)
    assert [p.mlockall(f) for f in (0, 4, 8)] == [-22, -22, -22]
    assert p.mlockall(1) == 0
    assert (p.mm.rss_anon, p.mm.locked_vm) == (4, 4)
    anon(p, 4, R)
    assert p.mm.locked_vm == 4
    assert p.mlockall(2) == 0
    b = anon(p, 4)
    assert (bits(p, b, 4, PRESENT), p.mm.locked_vm) == (4, 8)
    assert p.mlockall(2 | 4) == 0
    c = anon(p, 4)
    assert (bits(p, c, 4, PRESENT), "lf" in (p.snapshot().vmas[0].vm_flags or ())) == (0, True)
    assert p.munlockall() == 0
    assert p.mm.locked_vm == 0
    p.munmap(a, 4 * PAGE)
    p.machine.check()


def test_private_locked_range_becoming_writable_is_copied_at_once() -> None:
    # mprotect_fixup populates, so that no fault is left.
    p = process()
    a = anon(p, 4, R)
    p.mlock(a, 4 * PAGE)
    before = p.min_flt
    p.mprotect(a, 4 * PAGE, RW)
    assert (p.min_flt - before, p.access(a, 4 * PAGE, "w").faults) == (4, [])


def test_msync_errors() -> None:
    p = process()
    anon(p, 2, page=0)
    anon(p, 2, page=4)
    assert p.msync(BASE, 6 * PAGE, 4) == -12
    assert p.msync(BASE, 2 * PAGE, 1) == 0
    assert p.msync(BASE, PAGE, 5) == -22
    assert p.msync(BASE + 1, PAGE, 4) == -22
    assert p.msync(BASE + 2 * PAGE, PAGE, 4) == -12
    p.mlock(BASE, PAGE)
    assert p.msync(BASE, PAGE, 2) == -16


@pytest.mark.parametrize("profile", PROFILES)
def test_soft_dirty_from_ptes_and_from_vmas(profile: str) -> None:
    p = process(profile)
    a = anon(p, 8)
    assert bits(p, a, 8, SOFT) == 8  # the new vma, touched or not
    p.access(a, 8 * PAGE, "w")
    p.clear_refs(4)
    assert bits(p, a, 8, SOFT) == 0
    assert [(f.error_code, f.count) for f in p.access(a + PAGE, 2 * PAGE, "w").faults] == [(7, 1), (7, 1)]
    assert bits(p, a, 8, SOFT) == 2
    p.mprotect(a, 8 * PAGE, R)
    p.mprotect(a, 8 * PAGE, RW)
    assert bits(p, a, 8, SOFT) == 2  # read-only and back stays clean
    p.madvise(a + PAGE, PAGE, DONTNEED)
    p.access(a + PAGE, 1, "r")
    assert bits(p, a, 8, SOFT) == 1  # looks clean though the content changed
    assert p.clear_refs(6) == -22


def test_clear_refs_1_2_3_5() -> None:
    p = process()
    f = p.machine.file("/f", 4 * PAGE)
    a, b = anon(p, 4), p.mmap(0, 4 * PAGE, R, 2, f)
    p.access(a, 4 * PAGE, "w")
    p.access(b, 4 * PAGE, "r")
    for kind, referenced in ((3, (16, 0)), (2, (0, 0))):
        p.clear_refs(kind)
        assert (smaps(p, a)["Referenced"], smaps(p, b)["Referenced"]) == referenced
    p.access(a, PAGE, "r")
    assert smaps(p, a)["Referenced"] == 4
    p.clear_refs(1)
    assert smaps(p, a)["Referenced"] == 0
    p.munmap(a, 4 * PAGE)
    assert p.snapshot().accounting.status["VmHWM"] == 8 * PAGE  # type: ignore[union-attr]
    p.clear_refs(5)
    assert p.snapshot().accounting.status["VmHWM"] == 4 * PAGE  # type: ignore[union-attr]


def test_a_kernel_without_soft_dirty_says_clean_for_ever() -> None:
    p = process("linux-6.18", soft_dirty=False)
    a = anon(p, 2)
    p.access(a, 2 * PAGE, "w")
    assert bits(p, a, 2, SOFT) == 0
    assert p.clear_refs(4) == 0
    assert p.access(a, 2 * PAGE, "w").faults == []
    assert "sd" not in (p.snapshot().vmas[0].vm_flags or ())
