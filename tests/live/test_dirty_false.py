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
def test_a_vma_that_grows_is_marked_whole_and_listed_as_such(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        puppet.sys("munmap", at + 32 * PAGE, 32 * PAGE)
        puppet.write(at, 32)
        with track(pid=puppet.pid, backend="soft-dirty") as tracker:
            tracker.epoch()
            puppet.write(at + 3 * PAGE, 2)
            assert _inside(tracker.epoch(), at, 64) == {1: 2}  # WRITTEN
            puppet.sys("mremap", at, 32 * PAGE, 48 * PAGE, 0)  # grows in place; nobody writes
            assert _inside(tracker.epoch(), at, 64) == {6: 32}  # VMA_FLAG
            assert _inside(tracker.epoch(), at, 64) == {}


@pytest.mark.requires("soft-dirty", "uffd-wp-async")
def test_pagescan_beside_it_shows_that_nobody_wrote(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        puppet.sys("munmap", at + 32 * PAGE, 32 * PAGE)
        puppet.write(at, 32)
        with track(pid=puppet.pid, backend="all") as tracker:
            tracker.epoch()
            puppet.sys("mremap", at, 32 * PAGE, 48 * PAGE, 0)
            puppet.write(at + 3 * PAGE, 2)
            epoch = tracker.epoch()
            assert _inside(epoch, at, 64) == {1: 2}
            rows = [
                row for row in epoch.details["disagree"]
                if any(at <= int(start, 16) < at + 64 * PAGE for start, _ in row["ranges"])
            ]  # fmt: skip
            assert [(row["only"], row["reason"]) for row in rows] == [("soft-dirty", "vma_flag")]


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
