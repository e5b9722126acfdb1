"""The replay of address spaces: cut, merge and split on known lists; and against the kernel at exit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pagelens.capture.areas import Area, Space, find
from pagelens.capture.reader import Capture
from pagelens.capture.spaces import Spaces
from pagelens.vm.vma import Prot, Vma
from support.captures import record
from support.subjects import Subjects

P = 4096
RW = Prot.READ | Prot.WRITE
NONE: frozenset[str] = frozenset()


def area(start: int, end: int, prot: Prot = RW, made_by: int = 0) -> Area:
    return Area(Vma(start * P, end * P, prot, vm_flags=NONE), made_by)


def shape(space: Space) -> list[tuple[int, int, Prot]]:
    return [(a.vma.start // P, a.vma.end // P, a.vma.prot) for a in space.areas]


def test_put_merges_equal_neighbours() -> None:
    space = Space()
    for start, end in ((0, 2), (4, 6), (2, 4)):
        space.put(area(start, end))
    assert shape(space) == [(0, 6, RW)]
    space.put(area(6, 8, Prot.READ))
    assert shape(space) == [(0, 6, RW), (6, 8, Prot.READ)]


def test_cut_splits_and_returns_what_was_there() -> None:
    space = Space([area(0, 10)])
    assert [(a.vma.start, a.vma.end) for a in space.cut(3 * P, 5 * P)] == [(3 * P, 5 * P)]
    assert shape(space) == [(0, 3, RW), (5, 10, RW)]
    assert space.cut(20 * P, 30 * P) == []
    assert len(space.cut(2 * P, 6 * P)) == 2
    assert shape(space) == [(0, 2, RW), (6, 10, RW)]


def test_change_splits_then_merges_back() -> None:
    space = Space([area(0, 10)])
    space.change(4 * P, 6 * P, prot=Prot.READ)
    assert shape(space) == [(0, 4, RW), (4, 6, Prot.READ), (6, 10, RW)]
    space.change(4 * P, 6 * P, prot=RW)
    assert shape(space) == [(0, 10, RW)]
    space.change(0, 1 << 63, set=frozenset({"lo"}), clear=NONE)
    assert [a.vma.vm_flags for a in space.areas] == [frozenset({"lo"})]
    assert [a.vma.vm_flags for a in space.copy().areas] == [NONE]  # a fork child has nothing locked


def test_file_offsets_move_with_a_cut() -> None:
    vma = Vma(0, 10 * P, RW, inode=7, offset=100 * P, name="/f", vm_flags=NONE)
    space = Space([Area(vma)])
    space.cut(2 * P, 3 * P)
    assert [(a.vma.start // P, a.vma.offset // P) for a in space.areas] == [(0, 100), (3, 103)]


def test_find() -> None:
    space = Space([area(0, 2), area(5, 6, Prot.READ), Area(Vma(100 * P, 110 * P, RW, name="[stack]"))])
    addr = np.array([0, P, 2 * P, 5 * P, 7 * P, 99 * P, 105 * P, 110 * P], np.uint64)
    assert find(space, addr).tolist() == [0, 0, -1, 1, 2, 2, 2, -1]  # below a stack: the stack's growth


@pytest.mark.requires("root", "bpf", "libbpf", "perf-system")
def test_replay_agrees_with_the_kernel_at_exit(subjects: Subjects, tmp_path: Path) -> None:
    for command in ([subjects("placed_faults")], [sys.executable, "-c", "import ctypes, json, sqlite3"]):
        spaces = Spaces(Capture(record(tmp_path, *command)))
        same, total = spaces.agreement()
        assert (same, spaces.notes) == (total, [])
        assert total > 20
