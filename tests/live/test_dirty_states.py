"""The table of states in which a target can be: state -> exit code of `dirty` -> what it says.

One test, so that the table can be read as one. Every row ends with the target as it was found: in its state, traced
by nobody but by whoever traced it before, without a descriptor of ours.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.nobody import as_nobody
from support.recording import pagelens
from support.states import (
    Maker,
    confined,
    each_row,
    exiting,
    frozen,
    gone,
    in_exec,
    in_exec_at_times,
    kernel_thread,
    leader_gone,
    open_place,
    other_namespace,
    other_user,
    own_userfaultfd,
    running,
    setuid,
    state,
    stopped,
    thirty_two_bits,
    traced,
    zombie,
)

pytestmark = pytest.mark.requires("root", "uffd-wp-async")

# state, as root?, exit codes that are right, what is said: in the JSON of the epoch (code 0) or in the message.
TABLE: list[tuple[Maker, bool, tuple[int, ...], str]] = [
    (running, True, (0,), '"complete": true'),
    (stopped, True, (0,), '"complete": true'),
    (
        in_exec,
        True,
        (0, 3),
        "exec",
    ),  # a thousand times a second: an epoch of which nothing is known, or refused
    (in_exec_at_times, True, (0,), "called exec: everything that the new image holds is listed"),
    (other_user, True, (0,), '"complete": true'),
    (other_namespace, True, (0,), '"complete": true'),
    (setuid, True, (0,), '"complete": true'),
    (own_userfaultfd, True, (0,), "belong to the program's own userfaultfd"),
    (leader_gone, True, (0,), '"complete": true'),
    (exiting, True, (0, 4), ""),  # at the look, or before it
    (gone, True, (4,), "no process 4000000"),
    (zombie, True, (4,), "is a zombie"),
    (kernel_thread, True, (2,), "is a kernel thread: it has no address space of its own"),
    (frozen, True, (3,), "is frozen by its cgroup"),
    (traced, True, (3,), "is traced by"),
    (confined, True, (3,), "is confined by seccomp"),
    (thirty_two_bits, True, (3,), "is 32-bit"),
    (gone, False, (4,), "no process 4000000"),
    (zombie, False, (4,), "is a zombie"),
    (kernel_thread, False, (2,), "is a kernel thread"),
    (running, False, (3,), "fix: run pagelens as root"),
    (setuid, False, (3,), "fix: run pagelens as root"),
    (other_user, False, (0,), '"complete": true'),
]


@pytest.fixture
def place() -> Iterator[Path]:
    with open_place() as directory:
        yield directory


def test_state_exit_code_message(place: Path) -> None:
    with contextlib.closing(each_row(TABLE, place)) as rows:
        for row, target, stack, (make, root, codes, text) in rows:
            argv = ["dirty", str(target.pid), "--interval", "0.1", "--count", "1", "--format", "json"]
            warm = running(place, stack)
            done = (
                pagelens(*argv) if root else as_nobody(argv, [[*argv[:1], str(warm.pid), *argv[2:]]], place)
            )
            said = (row, done.stdout, done.stderr)
            assert done.returncode in codes, said
            assert text in (done.stdout if done.returncode == 0 else done.stderr), said
            assert "Traceback" not in done.stderr, said
            if done.returncode:
                assert len(done.stderr.splitlines()) == 1, said
                assert not done.stdout, said
            else:
                assert json.loads(done.stdout)["pid"] == target.pid, said
            if make in (gone, exiting):
                continue
            status = Path(f"/proc/{target.pid}/status").read_text()
            assert f"TracerPid:\t{target.tracer}\n" in status, said
            if make is stopped:
                assert state(target.pid) == "T", said
            with contextlib.suppress(OSError):  # a kernel thread, a zombie
                links = [str(link.readlink()) for link in Path(f"/proc/{target.pid}/fd").iterdir()]
                assert sum("userfaultfd" in name for name in links) == (make is own_userfaultfd), said
