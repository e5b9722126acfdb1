"""False dirt: pages that soft-dirty marks and nobody wrote, told from written ones."""

from __future__ import annotations

import pytest

from pagelens.dirty.epoch import Epoch
from pagelens.dirty.track import track
from support.puppet import Puppet
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
