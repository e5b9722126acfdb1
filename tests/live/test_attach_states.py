"""The table of states in which a target can be: state -> exit code of `attach` -> what it says.

One test, so that the table can be read as one. Every row ends with the target as it was found: in its state, traced
by nobody but by whoever traced it before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.nobody import as_nobody
from support.recording import pagelens
from support.states import (
    Maker,
    each_row,
    frozen,
    gone,
    in_exec,
    kernel_thread,
    leader_gone,
    mid_exit,
    open_place,
    other_namespace,
    other_user,
    running,
    setuid,
    state,
    stopped,
    thirty_two_bits,
    traced,
    zombie,
)

pytestmark = pytest.mark.requires("root", "bpf", "btf", "libbpf", "perf-system", "native")


# state, as root?, exit code, what the message says.
TABLE: list[tuple[Maker, bool, int, str]] = [
    (running, True, 0, "unexplained 0"),
    (stopped, True, 0, "unexplained 0"),
    (frozen, True, 0, "unexplained 0"),
    (traced, True, 0, "unexplained 0"),
    (leader_gone, True, 0, "unexplained 0"),
    (in_exec, True, 0, "unexplained 0"),
    (mid_exit, True, 0, "unexplained 0"),
    (other_user, True, 0, "unexplained 0"),
    (other_namespace, True, 0, "unexplained 0"),
    (setuid, True, 0, "unexplained 0"),
    (thirty_two_bits, True, 0, "unexplained 0"),
    (gone, True, 4, "no process 4000000"),
    (zombie, True, 4, "is a zombie"),
    (kernel_thread, True, 2, "is a kernel thread: it has no address space of its own"),
    (gone, False, 4, "no process 4000000"),
    (kernel_thread, False, 2, "is a kernel thread"),
    (running, False, 3, "is another user's, or has more rights than we (setuid); fix: sudo pagelens attach"),
    (setuid, False, 3, "is another user's, or has more rights than we (setuid); fix: sudo pagelens attach"),
    (other_user, False, 0, "unexplained 0"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    with open_place() as directory:
        yield directory


@pytest.mark.timeout(600)
def test_state_exit_code_message(place: Path) -> None:
    with contextlib.closing(each_row(TABLE, place)) as rows:
        for row, target, _, (make, root, code, text) in rows:
            capture = place / "a.plens"
            argv = ["attach", str(target.pid), "--duration", "0.1", "-c", str(capture), "--force"]
            warm = ["attach", str(os.getpid()), "--duration", "0", "--method", "perf"]
            warm += ["--force", "-c", str(place / "warm.plens")]
            done = pagelens(*argv) if root else as_nobody(argv, [warm], place)
            assert done.returncode == code, (row, done.stderr)
            assert text in done.stderr, (row, done.stderr)
            assert "Traceback" not in done.stderr, (row, done.stderr)
            errors = [line for line in done.stderr.splitlines() if "attaching to" not in line]
            if code:
                assert len(errors) == 1, (row, done.stderr)
                assert not capture.exists(), row
            else:
                shutil.rmtree(capture)
                assert f"TracerPid:\t{target.tracer}\n" in Path(f"/proc/{target.pid}/status").read_text(), row
                if make is stopped:
                    assert state(target.pid) == "T"
