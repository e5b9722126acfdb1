"""Increments of a watched process: whatever it does between two, each is the process as it was."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from pagelens.checkpoint.incremental import Chain
from pagelens.checkpoint.look import diff, open_side
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.tracked import METHOD
from pagelens.checkpoint.verify import verify
from support.puppet import MADV, MAP_SHARED, PAGE, RW, Puppet
from support.scribe import process_state
from support.subjects import Subjects


@pytest.mark.requires("uffd-wp-async")
def test_random_operations_between_increments(subjects: Subjects, tmp_path: Path) -> None:
    rng = random.Random(11)
    with Puppet(subjects("puppet")) as puppet:
        area, other = puppet.island(64), puppet.island(600)
        puppet.write(area, 32)
        puppet.write(other, 512)
        memfd = puppet.sys("memfd_create", puppet.line, 0)
        puppet.sys("ftruncate", memfd, 8 * PAGE)
        shared = puppet.mmap(8, RW, MAP_SHARED, fd=memfd)
        extra: list[int] = []
        stored = []
        with Chain(puppet.pid, tmp_path / "chain", keep=9) as chain:
            assert chain.notes == []
            for round_ in range(25):
                for _ in range(rng.randrange(5)):
                    where = rng.choice((area, other)) + rng.randrange(50) * PAGE
                    match rng.randrange(8):
                        case 0 | 1 | 2:
                            puppet.write(where, rng.randrange(1, 9), value=rng.randrange(256))
                        case 3:
                            puppet.sys("madvise", where, 3 * PAGE, MADV["DONTNEED"])
                            puppet.tell("read", where, 2 * PAGE, PAGE)
                        case 4:
                            extra.append(puppet.island(8))
                            puppet.write(extra[-1], 4, value=round_)
                        case 5 if extra:
                            target = puppet.island(8)
                            moved = extra.pop()
                            puppet.sys("mremap", moved, 8 * PAGE, 8 * PAGE, 3, target)
                            extra.append(target)
                        case 6 if extra:
                            puppet.sys("munmap", extra.pop(), 8 * PAGE)
                        case _:
                            puppet.write(shared + rng.randrange(8) * PAGE, value=rng.randrange(256))
                deadline = time.monotonic() + 5
                while process_state(puppet.pid)[0] != "S":
                    assert time.monotonic() < deadline
                done = chain.take()
                now = Stored.open(done.path)
                found = diff(now, open_side(puppet.pid))
                assert found.same, found
                stored.append((done.stored_pages, done.captured_pages, done.method))
            assert [m for _, _, m in stored].count(METHOD) >= 20
            assert all(captured < 200 for _, captured, m in stored if m == METHOD)
            newest = sorted((tmp_path / "chain").iterdir())[-9:]
            assert all(verify(path).ok for path in newest)
        assert process_state(puppet.pid)[1] == 0
