"""The replay of address spaces: cut, merge and split on known lists; and against the kernel at exit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pagelens.capture.areas import Area, Space, find
from pagelens.capture.merging import Rules, forked, insert, modify, prepare, rules_of, touched
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


RULES = Rules()
OLD = Rules(unfaulted_joins=False)


def put(space: Space, *areas: Area, rules: Rules = RULES) -> None:
    for one in areas:
        insert(space, one, rules)


def rights(space: Space, start: int, end: int, prot: Prot, rules: Rules = RULES) -> None:
    modify(space, start * P, end * P, lambda a: a.vma.replaced(prot=prot), rules)


def test_new_areas_merge_with_equal_neighbours() -> None:
    space = Space()
    put(space, area(0, 2), area(4, 6), area(2, 4))
    assert shape(space) == [(0, 6, RW)]
    put(space, area(6, 8, Prot.READ))
    assert shape(space) == [(0, 6, RW), (6, 8, Prot.READ)]


def test_two_written_neighbours_stay_apart() -> None:
    """Equal in maps, but each with an anon_vma of its own: what lies between joins the left one only."""
    space = Space()
    put(space, area(0, 2), area(4, 6))
    for addr in (P, 4 * P):
        touched(space, addr, 1, RULES)
    put(space, area(2, 4))
    assert shape(space) == [(0, 4, RW), (4, 6, RW)]
    rights(space, 4, 6, Prot.READ)
    rights(space, 4, 6, RW)
    assert shape(space) == [(0, 4, RW), (4, 6, RW)]
    # Read faults and failed writes leave an area as it was; one that is written takes its neighbour's.
    put(space, area(10, 12), area(12, 14, Prot.READ))
    touched(space, 10 * P, 0, RULES)
    touched(space, 12 * P, 2, RULES)
    assert [a.anon for a in space.areas[2:]] == [0, 0]
    touched(space, 10 * P, 1, RULES)
    rights(space, 12, 13, RW)
    assert shape(space)[2:] == [(10, 13, RW), (13, 14, Prot.READ)]


@pytest.mark.parametrize(("rules", "joined"), [(RULES, True), (OLD, False)])
def test_a_written_area_and_a_new_one_below(rules: Rules, joined: bool) -> None:
    """Before 6.16 an area without anon_vma does not take in one that has it."""
    space = Space()
    put(space, area(0, 2), area(4, 6, Prot.READ), rules=rules)
    put(space, area(2, 4, Prot.READ), rules=rules)
    touched(space, P, 1, rules)
    rights(space, 2, 4, RW, rules)
    assert shape(space)[0] == (0, 4, RW)  # into the written one: always
    space = Space()
    put(space, area(0, 2), area(2, 4, Prot.READ), rules=rules)
    prepare(space, 1)
    rights(space, 2, 4, RW, rules)
    assert (shape(space) == [(0, 4, RW)]) is joined


def test_areas_of_a_fork_child_do_not_grow() -> None:
    space = Space()
    put(space, area(0, 2))
    touched(space, 0, 1, RULES)
    child = forked(space)
    put(child, area(2, 4))
    assert shape(child) == [(0, 2, RW), (2, 4, RW)]
    put(space, area(2, 4))
    assert shape(space) == [(0, 4, RW)]


def test_cut_splits_and_returns_what_was_there() -> None:
    space = Space([area(0, 10)])
    assert [(a.vma.start, a.vma.end) for a in space.cut(3 * P, 5 * P)] == [(3 * P, 5 * P)]
    assert shape(space) == [(0, 3, RW), (5, 10, RW)]
    assert space.cut(20 * P, 30 * P) == []
    assert len(space.cut(2 * P, 6 * P)) == 2
    assert shape(space) == [(0, 2, RW), (6, 10, RW)]


def test_modify_splits_then_merges_back() -> None:
    space = Space([area(0, 10)])
    rights(space, 4, 6, Prot.READ)
    assert shape(space) == [(0, 4, RW), (4, 6, Prot.READ), (6, 10, RW)]
    rights(space, 4, 6, RW)
    assert shape(space) == [(0, 10, RW)]
    modify(space, 0, 1 << 63, lambda a: a.vma.replaced(vm_flags=frozenset({"lo"})), RULES)
    assert [a.vma.vm_flags for a in space.areas] == [frozenset({"lo"})]
    assert [a.vma.vm_flags for a in forked(space).areas] == [NONE]  # a fork child has nothing locked


def test_modify_at_a_hole() -> None:
    """mprotect stops there, with its work before it done; madvise goes on behind it."""
    for gaps, last in ((False, RW), (True, Prot.READ)):
        space = Space([area(0, 2), area(4, 6)])
        modify(space, 0, 6 * P, lambda a: a.vma.replaced(prot=Prot.READ), RULES, gaps=gaps)
        assert shape(space) == [(0, 2, Prot.READ), (4, 6, last)]


def test_rules_by_release() -> None:
    assert rules_of("Linux 6.18.44 #1 SMP x86_64", {}).unfaulted_joins
    old = rules_of("Linux 6.1.0-40-amd64 #1 SMP", {"thp": "always", "overcommit_memory": 2})
    assert (old.unfaulted_joins, old.next_first, old.close_forbids, old.thp, old.overcommit) == (
        False, True, True, "always", 2,
    )  # fmt: skip


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
        found = spaces.agreement()
        assert (found.same_vmas, found.same_pages, spaces.notes) == (found.vmas, found.pages, [])
        assert found.vmas > 20


@pytest.mark.requires("root", "bpf", "libbpf", "perf-system")
def test_replay_of_shuffled_areas(subjects: Subjects, tmp_path: Path) -> None:
    """Maps, moves, protects, locks and writes random ranges of one arena, with children: each mapped page and
    its rights are exact, and so are nearly all merges (what a failed populate wrote before is not recorded)."""
    found = Spaces(Capture(record(tmp_path, subjects("shuffle"), 7, 600))).agreement()
    assert found.same_pages == found.pages > 1000
    assert found.vmas > 200 and found.vmas - found.same_vmas <= found.vmas // 100, found
