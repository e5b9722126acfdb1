"""Page-cache residency and folio orders of mapped files: exact, on files that the test fills and drops."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pagelens.linux import maps, residency
from pagelens.linux.procfs import Process

PAGES = 64


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file of 64 pages on a real disk; nothing of it is in the page cache."""
    path = Path(os.environ.get("PAGELENS_DISK", "/var/tmp")) / f"pagelens-residency-{os.getpid()}"
    path.write_bytes(os.urandom(PAGES * 4096))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    yield path
    path.unlink()


def cached_pages(path: Path) -> list[int]:
    with Process.open(os.getpid()) as proc:
        found, refused = residency.read(proc, maps.read(proc))
    mine = [f for f in found if f.inode == path.stat().st_ino]
    assert len(mine) == 1
    assert refused <= len(found)
    return [
        i
        for s, n in zip(mine[0].start.tolist(), mine[0].count.tolist(), strict=True)
        for i in range(s, s + n)
    ]


def test_only_what_was_read_is_resident(file: Path) -> None:
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as area:
        area.madvise(mmap.MADV_RANDOM)
        if cached_pages(file):
            pytest.skip(
                "missing capability: a disk file system that drops its cache (this is tmpfs or overlay)"
            )
        assert area[5 * 4096] == area[5 * 4096]
        assert area[40 * 4096] == area[40 * 4096]
        assert cached_pages(file) == [5, 40]


def test_asking_changes_nothing(file: Path) -> None:
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as area:
        assert len(area) == PAGES * 4096
        assert cached_pages(file) == cached_pages(file)


@pytest.mark.requires("kpageflags")
def test_orders_are_those_of_the_folios(file: Path) -> None:
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as area:
        source.read()
        assert sum(area[i * 4096] for i in range(PAGES)) > 0
        with Process.open(os.getpid()) as proc:
            found, _ = residency.read(proc, maps.read(proc))
    mine = next(f for f in found if f.inode == file.stat().st_ino)
    assert mine.pages == PAGES
    assert (mine.order >= 0).all(), "every page is mapped here: its folio is known"
    # A folio of order k begins at a multiple of 2**k and is whole: its pages in the file come in such numbers.
    per_page = np.repeat(mine.order, mine.count)
    at = 0
    while at < PAGES:
        size = 1 << int(per_page[at])
        assert at % size == 0
        assert (per_page[at : at + size] == per_page[at]).all()
        at += size


@pytest.mark.requires("kpageflags", "thp")
def test_a_huge_page_is_one_folio_of_order_nine() -> None:
    from pagelens.linux import pagemap

    size = 2 << 20
    with mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        base = np.frombuffer(area, np.uint8).ctypes.data
        start = -(-base // size) * size
        area[start - base] = 1
        with Process.open(os.getpid()) as proc:
            runs = pagemap.read(proc, maps.read(proc), within=(start, start + size), pfns=True).runs
        assert runs.pfn is not None
        order = residency.folio_orders(runs.pfn)
        if len(order) != 512:
            pytest.skip("missing capability: a free huge page (the kernel gave small ones)")
        assert set(order.tolist()) == {9}
