"""Rollback of memory that is not the process's alone: found before anything is touched."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from live.test_checkpoint_rollback import settle
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.fast import Checkpoint
from pagelens.checkpoint.look import diff, open_side
from pagelens.checkpoint.rollback import rollback
from pagelens.checkpoint.stored import Stored
from pagelens.linux.memory import read_memory
from pagelens.vm.errors import UsageError
from support.puppet import MAP_PRIVATE, MAP_SHARED, PAGE, PROT_READ, RW, Puppet
from support.scribe import process_state
from support.subjects import Subjects


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as puppet:
        puppet.tell("malloc", 100)
        yield puppet


@pytest.fixture(params=["shared memory", "a file"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    folder = "/dev/shm" if request.param == "shared memory" else tmp_path
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(b"\x05" * (4 * PAGE))
    yield Path(file.name)  # closed: who has it open is a concern
    Path(file.name).unlink()


def opened(puppet: Puppet, path: Path) -> int:
    with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
        mem.seek(puppet.line + 2048)
        mem.write(os.fsencode(path) + b"\0")
    return puppet.sys("open", puppet.line + 2048, 2, 0)


def test_memory_that_another_process_maps_is_not_changed_under_it(
    puppet: Puppet, path: Path, tmp_path: Path
) -> None:
    fd = opened(puppet, path)
    area = puppet.mmap(4, RW, MAP_SHARED, fd=fd)
    puppet.write(area, 4, value=1)
    alone = puppet.mmap(2)
    puppet.write(alone, 2, value=1)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4 * PAGE) as ours:
        puppet.write(alone, 2, value=2)
        settle(puppet.pid)
        rollback(puppet.pid, saved)  # it is mapped by two, and has not changed
        puppet.write(area + PAGE, 1, value=7)
        puppet.write(alone, 2, value=2)
        settle(puppet.pid)
        with pytest.raises(
            UsageError, match=rf"process {os.getpid()} \(.*\) maps it too.*\[shared\]; --accept shared"
        ):
            rollback(puppet.pid, saved)
        assert ours[::PAGE] == b"\1\7\1\1"  # nothing was touched
        assert read_memory(puppet.pid, alone, 2 * PAGE)[::PAGE] == b"\2\2"
        done = rollback(puppet.pid, saved, accept=("shared",))
        assert any("maps it too" in text for text in done.accepted)
        assert ours[::PAGE] == b"\1\1\1\1"
    puppet.write(area, 4, value=9)
    settle(puppet.pid)
    assert rollback(puppet.pid, saved).accepted == ()  # it is alone now
    assert read_memory(puppet.pid, area, 4 * PAGE)[::PAGE] == b"\1\1\1\1"
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0


def test_memory_that_is_read_only_here_stays_as_others_made_it(
    puppet: Puppet, path: Path, tmp_path: Path
) -> None:
    area = puppet.mmap(4, PROT_READ, MAP_SHARED, fd=opened(puppet, path))
    alone = puppet.mmap(2)
    puppet.write(alone, 2, value=1)
    puppet.tell("read", area, 4 * PAGE, PAGE)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c", with_files=True)
    saved = Stored.open(tmp_path / "c")
    path.write_bytes(b"\x06" * (4 * PAGE))
    puppet.write(alone, 2, value=2)
    settle(puppet.pid)
    with pytest.raises(UsageError, match=r"read-only here.*\[shared\]"):
        rollback(puppet.pid, saved)
    assert read_memory(puppet.pid, alone, 2 * PAGE)[::PAGE] == b"\2\2"
    rollback(puppet.pid, saved, accept=("shared",))
    assert read_memory(puppet.pid, alone, 2 * PAGE)[::PAGE] == b"\1\1"
    assert read_memory(puppet.pid, area, 4 * PAGE)[::PAGE] == b"\6\6\6\6"


def test_a_mapped_file_that_was_written_to_since_is_said(puppet: Puppet, path: Path, tmp_path: Path) -> None:
    area = puppet.mmap(4, RW, MAP_PRIVATE, fd=opened(puppet, path))
    puppet.write(area, 1, value=3)
    puppet.tell("read", area, 4 * PAGE, PAGE)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    assert diff(saved, open_side(puppet.pid)).same  # clean pages of it are no difference
    with path.open("r+b") as file:
        file.write(b"\x08" * (2 * PAGE))
    with pytest.raises(UsageError, match=r"which it maps, was written to since \[files\]"):
        rollback(puppet.pid, saved)
    rollback(puppet.pid, saved, accept=("files",))
    assert read_memory(puppet.pid, area, 4 * PAGE)[::PAGE] == b"\3\x08\5\5"


@pytest.mark.requires("uffd-wp-async")
def test_fast_rollbacks_refuse_what_they_would_change_under_others(puppet: Puppet, path: Path) -> None:
    area = puppet.mmap(4, RW, MAP_SHARED, fd=opened(puppet, path))
    puppet.write(area, 4, value=1)
    alone = puppet.mmap(2)
    puppet.write(alone, 2, value=1)
    settle(puppet.pid)
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 4 * PAGE) as ours,
        Checkpoint.take(puppet.pid) as point,
    ):
        puppet.write(alone, 2, value=2)
        settle(puppet.pid)
        assert point.rollback().fast
        puppet.write(area, 2, value=2)
        puppet.write(alone, 2, value=2)
        settle(puppet.pid)
        for _ in range(2):
            with pytest.raises(UsageError, match=r"other processes map too.*\[shared\]"):
                point.rollback()
        assert ours[::PAGE] == b"\2\2\1\1"
        assert read_memory(puppet.pid, alone, 2 * PAGE)[::PAGE] == b"\2\2"
        assert point.rollback(accept=("shared",)).fast
        assert ours[::PAGE] == b"\1\1\1\1"
        assert read_memory(puppet.pid, alone, 2 * PAGE)[::PAGE] == b"\1\1"
    with Checkpoint.take(puppet.pid) as point:
        puppet.write(area, 2, value=2)
        settle(puppet.pid)
        assert point.rollback().fast  # nobody else maps it now
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0
