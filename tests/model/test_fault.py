"""Faults: error codes, counts, signals, what is mapped (mm/memory.c; the figures of docs/KERNEL facts)."""

from __future__ import annotations

import pytest

from model.support import BASE, NONE, PAGE, PRIV, RW, RX, SHARED, R, anon, bits, process, smaps
from pagelens.model import File, InitialArea, Layout, Machine

EXCLUSIVE, FILE, PRESENT = 56, 61, 63


def codes(result: object) -> list[tuple[int, int]]:
    return [(f.error_code, f.count) for f in result.faults]  # type: ignore[attr-defined]


def test_read_then_write_of_anonymous_memory_is_two_faults_and_zero_pages_count_nowhere() -> None:
    p = process()
    a = anon(p, 4)
    assert codes(p.access(a, 2 * PAGE, "r")) == [(4, 1), (4, 1)]
    assert [hex(int(e) >> 56) for e in p.pagemap(a, 3)] == ["0x80", "0x80", "0x0"]
    assert smaps(p, a)["Rss"] == 0
    assert p.machine.kpagecount(p.machine.zero_frame) == 0
    assert codes(p.access(a, PAGE, "w")) == [(7, 1)]
    assert codes(p.access(a + 2 * PAGE, PAGE, "w")) == [(6, 1)]
    assert (smaps(p, a)["Rss"], smaps(p, a)["Private_Dirty"]) == (8, 8)
    assert p.min_flt == 4


@pytest.mark.parametrize(
    ("prot", "kind", "code", "signal"),
    [
        (R, "w", 6, ("SEGV", 2)),
        (NONE, "r", 4, ("SEGV", 2)),
        (RW, "x", 0x15, ("SEGV", 2)),
        (RX, "x", 0x14, None),
    ],
)
def test_permissions(prot: int, kind: str, code: int, signal: tuple[str, int] | None) -> None:
    p = process()
    a = anon(p, 1, prot)
    got = p.access(a, 1, kind)
    assert got.faults[-1].error_code == code
    assert (None if got.signal is None else (got.signal, got.si_code)) == signal


def test_execute_of_a_data_page_first_faults_it_in() -> None:
    # do_user_addr_fault: a not-present fetch is let in as a read; only the retry meets NX.
    p = process()
    got = p.access(anon(p, 1), 1, "x")
    assert [(f.error_code, f.failed) for f in got.faults] == [(0x14, False), (0x15, True)]
    assert p.min_flt == 1


def test_populated_page_after_mprotect_none_gives_4_not_5() -> None:
    p = process()
    a = anon(p, 1)
    p.access(a, 1, "w")
    p.mprotect(a, PAGE, NONE)
    got = p.access(a, 1, "r")
    assert (got.faults[0].error_code, got.si_code) == (4, 2)


def test_unmapped_is_code_1_and_beyond_the_file_is_a_bus_error_code_2() -> None:
    p = process()
    got = p.access(BASE, 1, "r")
    assert (got.signal, got.si_code, got.addr) == ("SEGV", 1, BASE)
    f = p.memfd_create("f")
    f.ftruncate(PAGE)
    a = p.mmap(0, 2 * PAGE, RW, 1, f)
    got = p.access(a, 2 * PAGE, "w")
    assert (got.signal, got.si_code, got.addr, got.minor) == ("BUS", 2, a + PAGE, 1)
    assert p.min_flt == 1


def test_mprotect_to_writable_needs_no_fault_where_the_page_is_exclusive() -> None:
    p = process()
    a = anon(p, 2)
    p.access(a, 2 * PAGE, "w")
    p.mprotect(a, 2 * PAGE, R)
    p.mprotect(a, 2 * PAGE, RW)
    assert p.access(a, 2 * PAGE, "w").faults == []
    child = p.fork()
    for q in (p, child):
        q.mprotect(a, 2 * PAGE, R)
        q.mprotect(a, 2 * PAGE, RW)
    assert p.access(a, PAGE, "w").minor == 1  # shared since the fork


def test_shared_file_write_faults_shmem_1_disk_2_after_a_read() -> None:
    p = process()
    mem = p.memfd_create("m")
    mem.ftruncate(PAGE)
    disk = p.machine.file("/d", PAGE)
    a, b = p.mmap(0, PAGE, RW, 1, mem), p.mmap(0, PAGE, RW, 1, disk)
    assert p.access(a, 1, "r").minor + p.access(a, 1, "w").minor == 1
    assert p.access(b, 1, "r").minor + p.access(b, 1, "w").minor == 2
    assert smaps(p, a)["Private_Dirty"] == smaps(p, b)["Private_Dirty"] == 4
    # Write-back cleans the disk's page and the next write faults again; shmem has none.
    p.msync(b, PAGE, 4)
    assert smaps(p, b)["Private_Clean"] == 4
    assert [f.error_code for f in p.access(b, 1, "w").faults] == [7]


def test_fault_around_maps_16_cached_pages_clamped_to_the_vma() -> None:
    p = process()
    f = p.machine.file("/lib", 64 * PAGE)
    a = p.mmap(BASE, 64 * PAGE, R, 0x12, f)
    assert p.access(a + 5 * PAGE, 1, "r").minor == 1
    assert bits(p, a, 64, PRESENT) == 16
    assert p.access(a, 64 * PAGE, "r").minor == 3
    assert p.maj_flt == 0


def test_page_cache_miss_is_major_and_maps_one_page() -> None:
    p = process()
    f = p.machine.file("/cold", 32 * PAGE, cached=False)
    a = p.mmap(BASE, 32 * PAGE, R, 0x12, f)
    got = p.access(a, 3 * PAGE, "r")
    assert (got.minor, got.major, p.maj_flt) == (0, 3, 3)


def test_private_file_page_read_first_then_written_and_written_first() -> None:
    # CASES 2: Rss stays, Private_Clean 4 -> 0, Private_Dirty 4 -> 8, Anonymous 4 -> 8.
    p = process()
    f = p.machine.file("/data", 2 * PAGE)
    a = p.mmap(BASE, 2 * PAGE, RW, 0x12, f)
    assert [x.error_code for x in p.access(a, 1, "w").faults] == [6]
    assert [x.error_code for x in p.access(a + PAGE, 1, "r").faults] == [4]
    before = smaps(p, a)
    assert [x.error_code for x in p.access(a + PAGE, 1, "w").faults] == [7]
    after = smaps(p, a)
    fields = ("Rss", "Private_Clean", "Private_Dirty", "Anonymous")
    assert [before[x] for x in fields] == [8, 4, 4, 4]
    assert [after[x] for x in fields] == [8, 0, 8, 8]
    assert bits(p, a, 2, FILE) == 0


def test_stack_grows_to_the_access_and_keeps_256_pages_from_an_accessible_area() -> None:
    layout = Layout(areas=[InitialArea(BASE - 4 * PAGE, BASE, 0x100173, (BASE >> 12) - 4)])
    p = Machine("linux-6.18").spawn(layout)
    assert p.access(BASE - 300 * PAGE, 1, "w").minor == 1
    assert p.snapshot().vmas[0].start == BASE - 300 * PAGE
    p.mmap(BASE - 1000 * PAGE, PAGE, RW, PRIV | 0x10)
    assert p.access(BASE - 743 * PAGE, 1, "w").minor == 1  # exactly 256 pages stay free
    got = p.access(BASE - 744 * PAGE, 1, "w")
    assert (got.signal, got.si_code) == ("SEGV", 1)
    p.mprotect(BASE - 1000 * PAGE, PAGE, NONE)
    assert p.access(BASE - 900 * PAGE, 1, "w").minor == 1  # an inaccessible one has no gap


def test_guard_pages_raise_segv_and_survive_dontneed() -> None:
    p = process()
    a = anon(p, 4)
    p.access(a, 4 * PAGE, "w")
    assert p.madvise(a + PAGE, PAGE, 102) == 0
    got = p.access(a, 4 * PAGE, "r")
    assert (got.signal, got.si_code, got.addr) == ("SEGV", 1, a + PAGE)
    assert bits(p, a, 4, 58) == 1
    p.madvise(a, 4 * PAGE, 4)
    assert bits(p, a, 4, 58) == 1
    p.madvise(a, 4 * PAGE, 103)
    assert p.access(a, 4 * PAGE, "w").minor == 4
    assert process("linux-6.12").madvise(BASE, PAGE, 102) == -22


def test_walk_and_tables_follow_what_is_touched() -> None:
    p = process()
    a = anon(p, 1024, at=BASE, page=0)
    assert [(level, there) for level, _, there in p.walk(a)] == [("pgd", False)]
    p.access(a, 1, "w")
    assert [there for _, _, there in p.walk(a)] == [True] * 4
    assert p.snapshot().accounting.status["VmPTE"] == 3 * PAGE  # type: ignore[union-attr]
    p.access(a + 600 * PAGE, 1, "w")
    assert p.snapshot().accounting.status["VmPTE"] == 4 * PAGE  # type: ignore[union-attr]
    p.munmap(a, 512 * PAGE)
    assert p.snapshot().accounting.status["VmPTE"] == 3 * PAGE  # type: ignore[union-attr]
    five = Machine("linux-6.18").spawn(Layout(levels=5))
    five.access(anon(five, 1), 1, "w")
    assert [level for level, _, _ in five.walk(five.snapshot().vmas[0].start)] == [
        "pgd",
        "p4d",
        "pud",
        "pmd",
        "pte",
    ]


@pytest.mark.parametrize(("profile", "tables"), [("linux-6.12", 5), ("linux-6.18", 3)])
def test_dontneed_frees_page_tables_from_6_14(profile: str, tables: int) -> None:
    p = process(profile)
    a = anon(p, 1024, page=0)
    anon(p, 1, R, page=1024)
    p.access(a, 1024 * PAGE, "w")
    p.access(a + 1024 * PAGE, 1, "r")
    assert p.mm.tables.bytes == 5 * PAGE
    p.madvise(a, 1024 * PAGE, 4)
    assert p.mm.tables.bytes == tables * PAGE


def test_shared_anonymous_memory_is_a_shmem_file() -> None:
    p = process()
    a = p.mmap(0, 2 * PAGE, RW, SHARED)
    child = p.fork()
    assert p.access(a, PAGE, "w").minor == 1
    assert child.access(a, PAGE, "w").minor == 1
    assert bits(p, a, 1, FILE) == 1
    assert bits(p, a, 1, EXCLUSIVE) == 0
    assert smaps(p, a)["Shared_Dirty"] == 4
    assert p.snapshot().vmas[0].name == "/dev/zero (deleted)"
    used = p.machine.frames.used
    child.exit()
    p.munmap(a, 2 * PAGE)
    assert (used, p.machine.frames.used) == (1, 0)


def test_file_object_options() -> None:
    machine = Machine("linux-6.18")
    p = machine.spawn()
    f = File(machine, "/ro", PAGE, writable=False, cached=True)
    assert p.mmap(0, PAGE, RW, 1, f) == -13
    a = p.mmap(0, PAGE, R, 1, f)
    assert p.mprotect(a, PAGE, RW) == -13
    assert p.mmap(0, PAGE, R, 4, f) == -22


def test_vdso_and_vvar_fault_in_without_a_file() -> None:
    areas = [
        InitialArea(BASE, BASE + 4 * PAGE, 0x1404_4411 & ~0x1000_0000, 0, None, "[vvar]"),
        InitialArea(BASE + 4 * PAGE, BASE + 6 * PAGE, 0x4_0075, 0, None, "[vdso]"),
    ]
    p = Machine("linux-6.18").spawn(Layout(areas=areas))
    assert p.access(BASE, 6 * PAGE, "r").minor == 6
    assert (p.mm.rss_file, smaps(p, BASE)["Rss"], smaps(p, BASE + 4 * PAGE)["Rss"]) == (2, 0, 8)
    child = p.fork()
    assert child.access(BASE + 4 * PAGE, 1, "x").minor == 1
    assert smaps(p, BASE + 4 * PAGE)["Shared_Clean"] == 4
    p.machine.check()
