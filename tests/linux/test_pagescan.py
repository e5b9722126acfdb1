"""PAGEMAP_SCAN as this package wraps it."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from pagelens.linux import pagescan
from pagelens.linux.pagescan import Category

PAGE = 4096


@pytest.mark.requires("pagemap-scan")
@pytest.mark.parametrize("regions", [511, 512, 513, 1024, 1500])
def test_each_region_comes_once_and_in_order(regions: int) -> None:
    # do_pagemap_scan leaves walk_end at the start of its last part, whose regions came twice.
    area = mmap.mmap(-1, 2 * regions * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, len(area), 2 * PAGE):
        area[at] = 1
    first = np.frombuffer(area, np.uint8).ctypes.data
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for room in (1 << 15, 512, 100):
            found = pagescan.scan(
                file.fileno(),
                [(first, first + len(area))],
                mask=Category.PRESENT,
                ret=Category.PRESENT,
                vec_len=room,
            )
            assert found.start.tolist() == list(range(first, first + len(area), 2 * PAGE))
            assert (found.end - found.start == PAGE).all()
