"""The other tools that a guest is to have (gdb, strace, drgn, CRIU) do their work there, on each kernel.

What other tests compare pagelens with is tried here first: a tool that is installed and does not work would make them
pass or fail for a wrong reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import drgn
import pytest

from support.pace import patience
from support.subjects import Subjects

PAGES = 300
SUM = sum((i * 7 + i // 4096) % 256 for i in range(PAGES * 4096))


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"missing capability: {name}")
    return path


class Keeper:
    """The subject `keeper`, in a session of its own, with nothing open that a saver could stumble over."""

    def __init__(self, program: Path, directory: Path) -> None:
        self.ask, self.answer = directory / "ask", directory / "answer"
        self.process = subprocess.Popen(
            [program, self.ask, self.answer],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self.process.pid
        # It has filled its memory once it sleeps between two looks.
        deadline = time.monotonic() + patience(10)
        while "nanosleep" not in Path(f"/proc/{self.pid}/wchan").read_text():
            assert time.monotonic() < deadline, "the subject does not wait"
            time.sleep(0.02)

    def told(self) -> tuple[int, int]:
        """(its pid, the sum of what its memory holds now); it ends with that."""
        self.ask.touch()
        deadline = time.monotonic() + patience(10)
        while not self.answer.exists() or not self.answer.read_text().endswith("\n"):
            assert time.monotonic() < deadline, "the subject does not answer"
            time.sleep(0.02)
        pid, total = self.answer.read_text().split()
        return int(pid), int(total)


@pytest.fixture
def keeper(subjects: Subjects, tmp_path: Path) -> Iterator[Keeper]:
    keeper = Keeper(subjects("keeper"), tmp_path)
    try:
        yield keeper
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper.pid, signal.SIGKILL)
        keeper.process.wait()


def test_gdb_reads_a_process_and_lets_go(keeper: Keeper) -> None:
    command = [_tool("gdb"), "-q", "-nx", "-batch", "-p", str(keeper.pid)]
    command += ["-ex", "backtrace", "-ex", "print kept_sum", "-ex", "print kept[4097]", "-ex", "detach"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"$1 = {SUM}\n" in done.stdout
    assert f"$2 = {(4097 * 7 + 1) % 256} " in done.stdout
    for function in ("wait_for", "main"):
        assert f" {function} (" in done.stdout, done.stdout
    assert "TracerPid:\t0" in Path(f"/proc/{keeper.pid}/status").read_text()
    assert keeper.told() == (keeper.pid, SUM)


def test_strace_sees_the_calls(subjects: Subjects, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [
        _tool("strace"),
        "-f",
        "-o",
        str(log),
        "-e",
        "trace=madvise,mmap",
        str(subjects("toucher")),
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    (advice,) = (line for line in lines if "MADV_NOHUGEPAGE" in line)
    assert f"madvise({done.stdout.strip()}, 36864, MADV_NOHUGEPAGE) = 0" in advice
    assert lines[-1].endswith("+++ exited with 0 +++")


def test_drgn_reads_a_process(keeper: Keeper, subjects: Subjects) -> None:
    program = drgn.Program()
    program.set_pid(keeper.pid)
    program.load_debug_info([subjects("keeper")])
    assert program["kept_sum"].value_() == SUM
    assert program["kept"][4097].value_() == (4097 * 7 + 1) % 256
    assert keeper.told() == (keeper.pid, SUM)


def test_criu_saves_and_restores(keeper: Keeper, tmp_path: Path, guest: None) -> None:
    # In guests only: this machine's CRIU may be older than its kernel, and refuses it then.
    criu = _tool("criu")
    images = tmp_path / "images"
    images.mkdir()
    for words in (["dump", "-t", str(keeper.pid)], ["restore", "-d"]):
        done = subprocess.run(
            [criu, *words, "-D", str(images), "-o", "log", "-v3"],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, (words, (images / "log").read_text()[-2000:])
        if words[0] == "dump":
            assert keeper.process.wait() == -signal.SIGKILL, "it is gone once it is saved"
    assert (images / "pages-1.img").stat().st_size >= PAGES * 4096
    assert keeper.told() == (keeper.pid, SUM)
