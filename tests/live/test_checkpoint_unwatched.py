"""Memory that userfaultfd cannot watch: checkpoints in chains and fast rollbacks go on with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from live.test_checkpoint_rollback import settle
from pagelens.checkpoint.fast import Checkpoint
from pagelens.checkpoint.incremental import Chain
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.tracked import METHOD
from pagelens.checkpoint.verify import verify
from pagelens.linux.memory import read_memory
from support.puppet import MAP_SHARED, NR, PAGE, RW, Puppet
from support.scribe import process_state
from support.subjects import Subjects

MAP_DROPPABLE, MAP_ANON = 0x8, 0x20


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as puppet:
        yield puppet


def droppable(puppet: Puppet, pages: int) -> int:
    flags = (MAP_DROPPABLE | MAP_ANON, -1 & (1 << 64) - 1, 0)
    addr, _ = puppet.tell("sys", NR["mmap"], 0, pages * PAGE, RW, *flags)
    if addr < 0:
        pytest.skip(f"missing capability: MAP_DROPPABLE ({os.strerror(-addr)})")
    return addr


def registered(pid: int, addr: int) -> bool:
    block = Path(f"/proc/{pid}/smaps").read_text().partition(f"\n{addr:x}-")[2]
    return " uw" in block.partition("VmFlags:")[2].partition("\n")[0]


@pytest.mark.requires("uffd-wp-async")
def test_a_chain_reads_droppable_memory_each_time_and_watches_the_rest(
    puppet: Puppet, tmp_path: Path
) -> None:
    state = droppable(puppet, 3)
    plain = puppet.mmap(64)
    puppet.write(plain, 64, value=1)
    puppet.write(state, 2, value=1)
    settle(puppet.pid)
    with Chain(puppet.pid, tmp_path / "chain") as chain:
        full = chain.take()
        for number in range(2, 6):
            puppet.write(state + PAGE, 1, value=number)
            puppet.write(plain + number * PAGE, 1, value=number)
            if number == 4:  # another vma list, so that all is registered anew
                puppet.mmap(1, RW)
            settle(puppet.pid)
            done = chain.take()
            assert done.method == METHOD, chain.notes
            told = [int(note.split()[0]) for note in done.notes if "pages cannot be watched" in note]
            if registered(
                puppet.pid, state
            ):  # 6.12 lets it be watched, later ones do not (vma_can_userfault)
                assert told == []
            else:
                assert told[0] >= 3  # those, and what the C library keeps so
            assert done.captured_pages < full.captured_pages // 2
            saved = Stored.open(done.path)
            assert saved.read(state, 3 * PAGE)[::PAGE] == bytes((1, number, 0))
            assert saved.read(plain, 64 * PAGE)[::PAGE] == bytes(
                n if 2 <= n <= number else 1 for n in range(64)
            )
        assert verify(chain.made[-1]).ok
        assert chain.notes == []
    assert process_state(puppet.pid)[1] == 0


@pytest.mark.requires("uffd-wp-async")
def test_fast_rollbacks_bring_droppable_memory_back(puppet: Puppet) -> None:
    state = droppable(puppet, 4)
    puppet.write(state, 2, value=1)
    settle(puppet.pid)
    with Checkpoint.take(puppet.pid) as point:
        for number in range(2, 6):
            puppet.write(state + PAGE, 2, value=number)
            if number == 3:
                puppet.madvise(state, 1, "DONTNEED")
            settle(puppet.pid)
            assert point.rollback().fast
            assert read_memory(puppet.pid, state, 4 * PAGE)[::PAGE] == b"\1\1\0\0"
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0


@pytest.mark.requires("uffd-wp-async")
def test_watching_shared_memory_does_not_allocate_what_it_lacks(puppet: Puppet, tmp_path: Path) -> None:
    # Write protection of shared memory leaves marks in empty entries, which pagemap shows as swapped.
    with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
        mem.seek(puppet.line + 2048)
        mem.write(b"sparse\0")
    fd = puppet.sys("memfd_create", puppet.line + 2048, 0)
    puppet.sys("ftruncate", fd, 256 * PAGE)
    area = puppet.mmap(256, RW, MAP_SHARED, fd=fd)
    puppet.write(area + 16 * PAGE, 4, value=1)
    settle(puppet.pid)

    def held() -> int:
        return Path(f"/proc/{puppet.pid}/fd/{fd}").stat().st_blocks * 512 // PAGE

    assert held() == 4
    with Chain(puppet.pid, tmp_path / "chain") as chain:
        for number in range(2, 5):
            done = chain.take()
            assert held() == number + 2
            assert not any("swap" in note for note in done.notes)
            saved = Stored.open(done.path)
            inside = (saved.rows["start"] >= area) & (saved.rows["start"] < area + 256 * PAGE)
            assert int(saved.rows["pages"][inside].sum()) == number + 2
            assert saved.read(area + 16 * PAGE, 4 * PAGE)[::PAGE] == bytes(
                (number - 1 if number > 2 else 1, 1, 1, 1)
            )
            puppet.write(area + 16 * PAGE, 1, value=number)
            puppet.write(area + (18 + number) * PAGE, 1, value=1)
            settle(puppet.pid)
