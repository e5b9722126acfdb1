"""Memory above 128 TiB, where page tables have five levels: looked at, saved, rolled back, recorded like any other."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from live.test_checkpoint_rollback import settle
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.incremental import Chain
from pagelens.checkpoint.look import diff, open_side
from pagelens.checkpoint.rollback import rollback
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.verify import verify
from pagelens.linux import snapshot
from pagelens.linux.memory import read_memory
from pagelens.linux.settings import user_space_end
from pagelens.model import Machine, adopt
from pagelens.vm import AddrRange
from pagelens.vm.units import TASK_SIZE, TASK_SIZE_LA57
from support import raw
from support.kcore import FIVE_LEVELS
from support.puppet import MADV, MAP_ANON, MAP_PRIVATE, NR, PAGE, RW, Puppet
from support.recording import assert_complete, pagelens, record
from support.subjects import Subjects

MAP_FIXED_NOREPLACE = 0x10_0000
# Across the end of the window, across an entry of the top table, and at the end of user space.
PLACES = (TASK_SIZE - 8 * PAGE, (1 << 48) - 8 * PAGE, TASK_SIZE_LA57 - 16 * PAGE)


def test_where_user_space_ends(subjects: Subjects) -> None:
    # The kernel's own word: the last page can be had (or is taken), the one behind it cannot.
    assert user_space_end() == (TASK_SIZE_LA57 if FIVE_LEVELS else TASK_SIZE)
    flags = MAP_PRIVATE | MAP_ANON | MAP_FIXED_NOREPLACE
    last = user_space_end() - PAGE
    with Puppet(subjects("puppet")) as puppet:
        found = [
            puppet.tell("sys", NR["mmap"], at, PAGE, 0, flags, 2**64 - 1, 0)[0] for at in (last, last + PAGE)
        ]
    assert found[0] in (last, -errno.EEXIST)
    assert found[1] == -errno.ENOMEM


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    if not FIVE_LEVELS:
        pytest.skip("missing capability: five levels of page tables (a processor and a kernel with la57)")
    with Puppet(subjects("puppet")) as puppet:
        for place in PLACES:
            assert puppet.mmap(16, at=place) == place
            puppet.write(place + 4 * PAGE, 8)
        yield puppet


def test_the_look(puppet: Puppet) -> None:
    for place in PLACES:
        assert raw.bits(puppet.pid, place, 16, raw.PRESENT) == 8
        runs = snapshot.take(puppet.pid, within=AddrRange(place, place + 16 * PAGE)).pages
        assert runs is not None
        assert runs.addresses().tolist() == [place + page * PAGE for page in range(4, 12)]
        shown = pagelens("pages", str(puppet.pid), f"{place:x}+64k")
        assert shown.returncode == 0, shown.stderr
    listed = pagelens("map", str(puppet.pid))
    assert all(f"{place:x}" in listed.stdout for place in PLACES), listed.stdout


def test_the_model_goes_on_from_there(puppet: Puppet) -> None:
    process = adopt(Machine("linux-7.2"), [snapshot.take(puppet.pid)]).processes[0]
    for place in PLACES:
        assert [level for level, *_ in process.walk(place + 5 * PAGE)] == ["pgd", "p4d", "pud", "pmd", "pte"]
        assert sum(fault.count for fault in process.access(place, 4 * PAGE, "w").faults) == 4
    # A hint above the window opens all of it; one below does not.
    for hint in (0, TASK_SIZE - 64 * PAGE, PLACES[1], PLACES[1], PLACES[2]):
        flags = MAP_PRIVATE | MAP_ANON
        assert process.mmap(hint, 4 * PAGE, RW, flags) == puppet.sys("mmap", hint, 4 * PAGE, RW, flags, -1, 0)


@pytest.mark.requires("uffd-wp-async")
def test_increments_and_rollback(puppet: Puppet, tmp_path: Path) -> None:
    settle(puppet.pid)
    with Chain(puppet.pid, tmp_path / "chain", keep=9) as chain:
        first = chain.take()
        for value, place in enumerate(PLACES, 20):
            puppet.write(place + 6 * PAGE, 2, value=value)
            puppet.write(place + 13 * PAGE, value=value)  # no page so far
        puppet.sys("madvise", PLACES[1] + 4 * PAGE, PAGE, MADV["DONTNEED"])
        settle(puppet.pid)
        done = chain.take()
        assert first.path != done.path
        stored = Stored.open(done.path)
        assert verify(done.path).ok
        assert diff(stored, open_side(puppet.pid)).same
        for value, place in enumerate(PLACES, 20):
            assert stored.read(place + 5 * PAGE, 9 * PAGE)[::PAGE] == bytes(
                [7, value, value, 7, 7, 7, 7, 0, value]
            )
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    for place in PLACES:
        puppet.write(place, 16, value=99)
    puppet.sys("munmap", PLACES[1] + 2 * PAGE, 12 * PAGE)
    settle(puppet.pid)
    rollback(puppet.pid, saved)
    settle(puppet.pid)
    assert diff(saved, open_side(puppet.pid)).same
    assert read_memory(puppet.pid, PLACES[1] + 6 * PAGE, PAGE)[:1] == bytes([21])


@pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")
@pytest.mark.parametrize("detail", ["lean", "normal"])  # lean packs what fits into 48 bits
def test_faults_there(puppet: Puppet, subjects: Subjects, tmp_path: Path, detail: str) -> None:
    del puppet  # it has said whether there is any
    run = record(tmp_path, [subjects("high"), *(f"{place:x}" for place in PLACES)], "--detail", detail)
    assert run.returncode == 0
    assert_complete(run)
    for place in PLACES:
        found = run.rows(f"kind = 'fault' and addr >= {place} and addr < {place + 16 * PAGE}")
        assert [f["addr"] for f in found] == [place + k * PAGE for k in (*range(16), 3)]
        assert {f["error_code"] for f in found} == ({6} if detail == "normal" else {None})
    if detail == "lean":
        return
    why = pagelens("why", str(run.path), f"{PLACES[1] + 3 * PAGE:x}")
    assert why.returncode == 0, why.stderr
    assert "first-write" in why.stdout, why.stdout
    assert "DONTNEED" in why.stdout, why.stdout
