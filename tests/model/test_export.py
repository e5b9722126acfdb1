"""State as the kernel reports it: maps, smaps, status, statm, kpagecount, kpageflags."""

from __future__ import annotations

import numpy as np
import pytest

from model.support import PAGE, PROFILES, RW, anon, process
from pagelens.model import InitialArea, Layout, Machine
from pagelens.vm import PageState, Prot

ANON, MMAP, UPTODATE, SWAPBACKED, ZERO = 12, 11, 3, 14, 24


def test_vma_list_has_names_offsets_and_flags() -> None:
    machine = Machine("linux-6.18")
    f = machine.file("/bin/true", 8 * PAGE)
    layout = Layout(
        start_brk=0x60_0000,
        brk=0x60_2000,
        start_stack=0x7FFF_0000_0800,
        start_code=0x40_0000,
        end_code=0x40_2F00,
        areas=[
            InitialArea(0x40_0000, 0x40_3000, 0x75, 1, f),
            InitialArea(0x60_0000, 0x60_2000, 0x10_0073, 0x600),
            InitialArea(0x7FFF_0000_0000, 0x7FFF_0000_1000, 0x10_0173, 0x7FFF_0000_0),
        ],
    )
    p = machine.spawn(layout)
    rows = [(v.name, v.perms, v.offset, v.prot) for v in p.snapshot().vmas]
    assert rows == [
        ("/bin/true", "r-xp", PAGE, Prot.READ | Prot.EXEC),
        ("[heap]", "rw-p", 0, Prot.READ | Prot.WRITE),
        ("[stack]", "rw-p", 0, Prot.READ | Prot.WRITE),
    ]
    assert p.snapshot().vmas[0].vm_flags == {"rd", "ex", "mr", "mw", "me"}
    assert p.statm() == (6, 0, 0, 3, 0, 3, 0)
    status = p.snapshot().accounting.status  # type: ignore[union-attr]
    assert [status[x] // 1024 for x in ("VmExe", "VmLib", "VmData", "VmStk")] == [12, 0, 8, 4]


def test_pss_is_rounded_as_the_kernel_rounds() -> None:
    p = process()
    a = anon(p, 1)
    p.access(a, PAGE, "w")
    family = [p] + [p.fork() for _ in range(2)]
    snapshot = p.snapshot()
    assert snapshot.accounting is not None
    # 4096 / 3 = 1365 bytes, printed as 1 kB.
    assert snapshot.accounting.column("Pss").tolist() == [1024]
    assert len(family) == 3


def test_rollup_sums_before_it_rounds() -> None:
    p = process()
    for i in range(3):
        p.access(anon(p, 2, page=3 * i), 2 * PAGE, "w")
    p.fork()
    p.fork()
    accounting = p.snapshot().accounting
    assert accounting is not None
    # Two pages by three mappings: 2,730.67 bytes an area, 2 KiB; three areas: 8,191 bytes, 7 KiB and not 6.
    assert accounting.column("Pss").tolist() == [2048, 2048, 2048]
    assert accounting.total["Pss"] == 7 * 1024
    assert accounting.total["Rss"] == 6 * PAGE


@pytest.mark.parametrize("profile", PROFILES)
def test_ksm_field_is_absent_on_6_1(profile: str) -> None:
    p = process(profile)
    anon(p, 1)
    accounting = p.snapshot().accounting
    assert accounting is not None
    assert ("KSM" in accounting.fields) is (profile != "linux-6.1")


def test_pages_carry_state_frame_and_map_count() -> None:
    p = process()
    a = anon(p, 4)
    p.access(a, PAGE, "r")
    p.access(a + PAGE, PAGE, "w")
    p.madvise(a + 3 * PAGE, PAGE, 102)
    p.fork()
    pages = p.snapshot().pages
    assert pages is not None and pages.mapcount is not None and pages.pfn is not None
    assert pages.addresses().tolist() == [a, a + PAGE, a + 3 * PAGE]
    states = [PageState(s) for s in pages.states().tolist()]
    assert states[0] == PageState.PRESENT | PageState.ZERO | PageState.SOFT_DIRTY
    assert states[1] == PageState.PRESENT | PageState.SOFT_DIRTY
    assert PageState.GUARD in states[2]
    assert pages.mapcount.tolist() == [0, 2, 0]
    machine = p.machine
    assert machine.kpagecount(int(pages.pfn[1])) == 2
    flags = machine.kpageflags(int(pages.pfn[1]))
    assert flags == 1 << ANON | 1 << MMAP | 1 << UPTODATE | 1 << SWAPBACKED
    assert machine.kpageflags(machine.zero_frame) == 1 << ZERO
    assert np.array_equal(p.pagemap(a, 4)[:2] & np.uint64((1 << 55) - 1), [machine.zero_frame, pages.pfn[1]])


def test_snapshot_says_how_it_was_made() -> None:
    p = process("linux-7.2")
    assert (p.snapshot().method, p.snapshot().complete) == ("model linux-7.2", True)
    assert p.mmap(0, PAGE, RW, 0x22) > 0
