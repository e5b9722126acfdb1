"""Where mmap without a hint puts a mapping (mm/mmap.c, mm/huge_memory.c: thp_get_unmapped_area)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import raw
from support.facts import Fact
from support.puppet import MAP_PRIVATE, PROT_READ, Puppet

HUGE = 2 * 2**20


def _top_is_free(puppet: Puppet) -> None:
    # Fills the holes that start-up left below the libraries, so that what follows is placed top-down in open
    # space.
    for pages in (2048, 512, 64, 8, 1):
        puppet.mmap(pages)


@pytest.mark.parametrize("mib", [2, 4, 32])
def test_alignment_of_huge_lengths(puppet: Puppet, fact: Fact, mib: int) -> None:
    """A length of a multiple of 2 MiB: aligned from 6.7 on, so that huge pages fit."""
    puppet.mmap(1)  # whatever was aligned by chance is not now
    aligned = [puppet.mmap(mib * 256) % HUGE == 0 for _ in range(3) if puppet.mmap(1)]
    fact(f"placement.anon_{mib}_mib_aligned", aligned == [True, True, True])


def test_odd_lengths_are_packed(puppet: Puppet, fact: Fact) -> None:
    """Not a multiple of 2 MiB: right below the one before."""
    puppet.mmap(1023)
    first = puppet.mmap(1025)
    second = puppet.mmap(1025)
    fact("placement.anon_odd_length_adjacent", first - second == 1025 * raw.PAGE)


def test_file_mapping(puppet: Puppet, fact: Fact, tmp_path: Path) -> None:
    """4 MiB of a file on ext4: aligned so that its huge pages could be mapped."""
    file = tmp_path / "data"
    file.write_bytes(bytes(2 * HUGE))
    name = str(file).encode() + b"\0"
    place = puppet.mmap(1)
    for offset, byte in enumerate(name):
        puppet.tell("write", place + offset, 1, 1, byte)
    fd = puppet.sys("open", place, 0)
    puppet.mmap(1)
    aligned = [
        puppet.mmap(1024, PROT_READ, MAP_PRIVATE, fd=fd) % HUGE == 0 for _ in range(3) if puppet.mmap(1)
    ]
    fact("placement.file_4_mib_aligned", aligned == [True, True, True])
