"""False dirt: pages that soft-dirty marks and nobody wrote, told from written ones."""

from __future__ import annotations

import ctypes
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from pagelens.dirty.epoch import Epoch
from pagelens.dirty.track import track
from support import raw
from support.puppet import MAP_ANON, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, Puppet
from support.subjects import Subjects

PAGE = 4096


def _inside(epoch: Epoch, at: int, pages: int) -> dict[int, int]:
    out: dict[int, int] = {}
    for address, why in zip(
        epoch.addresses().tolist(), epoch.why.repeat(epoch.count.astype(int)), strict=True
    ):
        if at <= address < at + pages * PAGE:
            out[int(why)] = out.get(int(why), 0) + 1
    return out


@pytest.mark.requires("soft-dirty")
def test_a_vma_that_grows_by_a_merge_is_marked_whole_and_listed_as_such(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        puppet.sys("munmap", at + 32 * PAGE, 32 * PAGE)
        puppet.write(at, 32)
        with track(pid=puppet.pid, backend="soft-dirty") as tracker:
            tracker.epoch()
            puppet.write(at + 3 * PAGE, 2)
            assert _inside(tracker.epoch(), at, 64) == {1: 2}  # WRITTEN
            puppet.mmap(16, at=at + 32 * PAGE)  # merges with the 32 pages below; nobody writes
            epoch = tracker.epoch()
            assert _inside(epoch, at, 64) == {6: 32}  # VMA_FLAG
            assert epoch.details["false_dirt"] >= 32
            assert _inside(tracker.epoch(), at, 64) == {}


@pytest.mark.requires("soft-dirty", "uffd-wp-async")
def test_watching_by_pagescan_keeps_the_merge_from_happening(subjects: Subjects) -> None:
    """A registered vma merges with no other, so both backends agree on what the bit alone gets wrong."""
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        puppet.sys("munmap", at + 32 * PAGE, 32 * PAGE)
        puppet.write(at, 32)
        with track(pid=puppet.pid, backend="all") as tracker:
            tracker.epoch()
            puppet.mmap(16, at=at + 32 * PAGE)
            puppet.write(at + 3 * PAGE, 2)
            epoch = tracker.epoch()
            assert _inside(epoch, at, 64) == {1: 2}
            assert not [
                row for row in epoch.details["disagree"]
                if any(at <= int(start, 16) < at + 64 * PAGE for start, _ in row["ranges"])
            ]  # fmt: skip


@pytest.mark.requires("soft-dirty")
def test_contents_discarded_and_read_again_look_clean_to_the_bit_and_are_listed(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(16)
        puppet.write(at, 16)
        with track(pid=puppet.pid, backend="soft-dirty") as tracker:
            tracker.epoch()
            puppet.madvise(at, 8, "DONTNEED")
            puppet.read(at, 4)
            assert _inside(tracker.epoch(), at, 16) == {4: 8}  # DISCARDED


def _to_other_node(pid: int, at: int, pages: int) -> int:
    """move_pages(2) to the NUMA node that they are not on; how many lie in another frame than before."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = (ctypes.c_void_p * pages)(*(at + i * PAGE for i in range(pages)))
    status = (ctypes.c_int * pages)()
    before = [entry & raw.PFN for entry in raw.pagemap(pid, at, pages)]
    assert libc.syscall(279, pid, pages, address, None, status, 0) == 0, os.strerror(ctypes.get_errno())
    target = (ctypes.c_int * pages)(*(1 - node for node in status))
    assert libc.syscall(279, pid, pages, address, target, status, 2) >= 0, os.strerror(ctypes.get_errno())
    after = [entry & raw.PFN for entry in raw.pagemap(pid, at, pages)]
    return sum(one != two for one, two in zip(before, after, strict=True))


@pytest.mark.requires("soft-dirty", "root")
@pytest.mark.usefixtures("no_numa_balancing")
def test_pages_that_the_kernel_moves_to_other_frames_are_marked_and_listed_as_such(
    subjects: Subjects,
) -> None:
    """What NUMA balancing and compaction do at any time, done here by move_pages (remove_migration_pte)."""
    if not Path("/sys/devices/system/node/node1").exists():
        pytest.skip("missing capability: two NUMA nodes")
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        shared = puppet.island(16, flags=MAP_SHARED | MAP_ANON)
        puppet.write(at, 32)
        puppet.write(shared, 16)
        with track(pid=puppet.pid, backend="soft-dirty") as tracker:
            tracker.epoch()
            assert _to_other_node(puppet.pid, at, 32) == 32
            assert _to_other_node(puppet.pid, shared, 16) == 16
            marked = raw.bits(puppet.pid, at, 32, raw.SOFT_DIRTY)
            assert marked in (0, 32)  # 0: a kernel that clears the bit again
            puppet.write(at + 32 * PAGE, 4)  # never moved
            expected = ({9: marked} if marked else {}) | {1: 4}  # MOVED, WRITTEN
            assert raw.bits(puppet.pid, shared, 16, raw.SOFT_DIRTY) == marked // 2
            epoch = tracker.epoch()
            assert _inside(epoch, at, 64) == expected
            assert _inside(epoch, shared, 16) == ({9: 16} if marked else {})
            # Written by this epoch's program, in frames that stay: nothing that was moved before is in doubt.
            puppet.write(at + 8 * PAGE, 8)
            epoch = tracker.epoch()
            assert _inside(epoch, at, 64) == {1: 8}
            assert _inside(epoch, shared, 16) == {}
        # A copy that a write makes after fork has a frame of its own too, and is no doubt.
        puppet.fork()
        with track(pid=puppet.pid, backend="soft-dirty") as tracker:
            before = [entry & raw.PFN for entry in raw.pagemap(puppet.pid, at, 16)]
            puppet.write(at, 16)
            assert not set(before) & {entry & raw.PFN for entry in raw.pagemap(puppet.pid, at, 16)}
            assert _inside(tracker.epoch(), at, 64) == {1: 16}
        puppet.back()


@pytest.mark.requires("soft-dirty", "root")
@pytest.mark.parametrize("pages", [16, 1024])
def test_what_mremap_brings_is_told_from_what_was_written(subjects: Subjects, pages: int) -> None:
    """To an address that was watched before, so that it is not new: mremap marks each entry that it moves, and none
    where it moves whole page tables (1,024 pages at an address that suits); both times the contents are others."""
    with Puppet(subjects("puppet")) as puppet:
        room = puppet.mmap(4 * pages + 1024)
        to = (room + (2 << 20) - 1) & -(2 << 20)
        at = to + 2 * pages * PAGE
        for area in (to, at):
            puppet.madvise(area, pages, "NOHUGEPAGE")
            puppet.write(area, pages)
        with track(pid=puppet.pid, backend="soft-dirty") as tracker:
            tracker.epoch()
            puppet.sys("mremap", at, pages * PAGE, pages * PAGE, 3, to)  # MAYMOVE | FIXED
            epoch = tracker.epoch()
            found = _inside(epoch, to, pages)
            assert sum(found.values()) == pages
            assert 1 not in found  # WRITTEN
            puppet.write(to, 8)
            assert _inside(tracker.epoch(), to, pages) == {1: 8}


@pytest.mark.requires("root")
@pytest.mark.usefixtures("ksm", "no_numa_balancing")
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("pagescan", marks=pytest.mark.requires("uffd-wp-async")),
        pytest.param("soft-dirty", marks=pytest.mark.requires("soft-dirty")),
    ],
)
def test_pages_that_ksm_merges_are_no_writes(subjects: Subjects, backend: str) -> None:
    """It takes the protection bit away, and the soft-dirty bit too: what was written before it came must be listed."""
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(32)
        puppet.write(at, 32, value=9)

        def shared() -> int:  # not by KPF_KSM, which 6.12 sets for every anonymous page
            ((_, pages),) = Counter(e & raw.PFN for e in raw.pagemap(puppet.pid, at, 32)).most_common(1)
            return pages

        with track(pid=puppet.pid, backend=backend) as tracker:
            tracker.epoch()
            puppet.write(at, 4, value=9)  # rewritten, and then merged
            puppet.sys("madvise", at, 32 * PAGE, 12)  # MADV_MERGEABLE
            for _ in range(600):
                if shared() == 32:
                    break
                time.sleep(0.05)
            assert shared() == 32
            epoch = tracker.epoch()
            written, rest = _inside(epoch, at, 4), _inside(epoch, at + 4 * PAGE, 28)
            assert sum(written.values()) == 4
            assert written.keys() <= {1, 9}  # WRITTEN, or MOVED where that is not known any more
            assert 9 in written
            assert rest.keys() <= {9}
            assert _inside(tracker.epoch(), at, 32) == {}
            puppet.write(at, 1, value=77)  # equal to no other page: not merged again
            assert _inside(tracker.epoch(), at, 32) == {1: 1}


@pytest.mark.requires("soft-dirty")
def test_a_reservation_of_terabytes_does_not_keep_the_target_held(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(8)
        puppet.write(at, 8)
        puppet.island(4 << 28, flags=MAP_PRIVATE | MAP_ANON | MAP_NORESERVE)  # 4 TiB
        with track(pid=puppet.pid, backend="soft-dirty") as tracker:
            tracker.epoch()
            puppet.write(at + PAGE, 2)
            epoch = tracker.epoch()
            assert _inside(epoch, at, 8) == {1: 2}
            unscanned = any("not watched (no PAGEMAP_SCAN)" in note for note in epoch.notes)
            assert epoch.complete != unscanned
