"""A system call that was interrupted by more than one checkpoint goes on as what it is."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path

from live.test_checkpoint_rollback import settle
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.look import diff, open_side
from pagelens.checkpoint.rollback import rollback
from pagelens.checkpoint.stored import Stored
from pagelens.linux.restart import named
from support.subjects import Subjects

POLL, RESTART_SYSCALL = 7, 219


def call_of(pid: int) -> int:
    word = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return -1 if word == "running" else int(word)


def test_a_call_that_the_kernel_has_restarted_once_is_made_again_and_not_taken_for_another(
    subjects: Subjects, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [subjects("polls")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as child:
        try:
            assert child.stdout is not None
            pid = int(child.stdout.readline())
            while call_of(pid) != POLL:
                time.sleep(0.001)
            stores = []
            for name in ("first", "second"):
                settle(pid)
                dump(pid, tmp_path / name)
                stores.append(Stored.open(tmp_path / name))
            settle(pid)
            assert call_of(pid) == RESTART_SYSCALL  # of the kernel's making, since the first
            assert [store.threads[0].regs["orig_rax"] for store in stores] == [POLL, POLL]
            assert diff(*stores).same
            assert diff(stores[0], open_side(pid)).same
            for store in stores:
                os.kill(pid, signal.SIGUSR1)
                assert child.stdout.readline() == b"-1 4\n"  # from here on there is nothing to restart
                settle(pid)
                rollback(pid, store)
                assert not select.select([child.stdout], [], [], 0.3)[0]
                assert call_of(pid) in (POLL, RESTART_SYSCALL)
        finally:
            child.kill()


def test_the_number_is_found_before_the_call() -> None:
    assert named(b"\x90" * 11 + b"\xb8\x07\0\0\0") == POLL
    assert named(b"\xb8\x23\0\0\0" + b"\xb8\xca\0\0\0" + b"\x90\x90" + b"\x40\x80\xf6\x80") == 202
    assert named(b"\xb8\x01\0\0\0" * 3) is None  # write(2) leaves nothing to restart
    assert named(b"\x48\x89\xf8" * 5) is None  # syscall(2): mov %rdi,%rax
