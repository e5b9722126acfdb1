"""What one read of a cached file maps besides (mm/memory.c: do_fault_around; mm/filemap.c:
filemap_map_pages)."""

from __future__ import annotations

import os
from pathlib import Path

from support import raw
from support.facts import Fact
from support.puppet import MAP_PRIVATE, MAP_SHARED, PROT_READ, RW, Puppet

PAGES = 64


def _map(puppet: Puppet, file: Path, prot: int, flags: int) -> int:
    # Cached and clean before it is mapped; 64 pages at an address that is a multiple of 64 pages. Written in
    # pieces of 64 pages, which is the size of the folios where the file system has large ones; twice that,
    # because a folio that ends with the file is mapped whole or not as it happens (filemap_map_folio_range,
    # finish_fault).
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(2):
        os.write(fd, bytes(range(256)) * 16 * PAGES)
    os.fsync(fd)
    os.close(fd)
    place = puppet.mmap(1)
    for offset, byte in enumerate(str(file).encode() + b"\0"):
        puppet.tell("write", place + offset, 1, 1, byte)
    fd = puppet.sys("open", place, 2)
    free = puppet.island(3 * PAGES)
    base = -(-free // (PAGES * raw.PAGE)) * PAGES * raw.PAGE
    puppet.sys("munmap", free, 3 * PAGES * raw.PAGE)
    return puppet.mmap(PAGES, prot, flags, at=base, fd=fd)


def test_read_of_cached_file(puppet: Puppet, fact: Fact, tmp_path: Path) -> None:
    """One read in the middle maps the 16 pages around it that are aligned."""
    base = _map(puppet, tmp_path / "file", PROT_READ, MAP_PRIVATE)
    before = raw.faults(puppet.pid)
    puppet.read(base + 20 * raw.PAGE)
    present = [bool(e & raw.PRESENT) for e in raw.pagemap(puppet.pid, base, PAGES)]
    assert raw.faults(puppet.pid)[0] - before[0] == 1
    assert raw.faults(puppet.pid)[1] == before[1]
    assert all(present[16:32])
    fact("fault_around.pages_of_one_read", sum(present))


def test_private_write_maps_one(puppet: Puppet, fact: Fact, tmp_path: Path) -> None:
    """A write fault maps its page alone."""
    base = _map(puppet, tmp_path / "file", RW, MAP_PRIVATE)
    puppet.write(base + 20 * raw.PAGE)
    fact("fault_around.pages_of_one_private_write", raw.bits(puppet.pid, base, PAGES, raw.PRESENT))


def test_shared_write_maps_one(puppet: Puppet, fact: Fact, tmp_path: Path) -> None:
    """A shared write too; after a read, ext4 faults once more to learn of the write (page_mkwrite)."""
    base = _map(puppet, tmp_path / "file", RW, MAP_SHARED)
    before = raw.faults(puppet.pid)[0]
    puppet.write(base + 20 * raw.PAGE)
    fact("fault_around.pages_of_one_shared_write", raw.bits(puppet.pid, base, PAGES, raw.PRESENT))
    puppet.read(base + 40 * raw.PAGE)
    puppet.write(base + 40 * raw.PAGE)
    fact("fault_around.faults_of_shared_write_read_write", raw.faults(puppet.pid)[0] - before)


def test_tmpfs(puppet: Puppet, fact: Fact) -> None:
    """shmem: small folios unless asked otherwise; a shared write after a read needs no second fault."""
    file = Path("/dev/shm") / f"pagelens-{puppet.pid}"
    try:
        base = _map(puppet, file, RW, MAP_SHARED)
        before = raw.faults(puppet.pid)[0]
        puppet.write(base + 20 * raw.PAGE)
        fact("fault_around.tmpfs_pages_of_one_shared_write", raw.bits(puppet.pid, base, PAGES, raw.PRESENT))
        puppet.read(base + 40 * raw.PAGE)
        fact("fault_around.tmpfs_pages_after_write_and_read", raw.bits(puppet.pid, base, PAGES, raw.PRESENT))
        puppet.write(base + 40 * raw.PAGE)
        fact("fault_around.tmpfs_faults_of_write_read_write", raw.faults(puppet.pid)[0] - before)
    finally:
        file.unlink()
