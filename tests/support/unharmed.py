"""A target must go on as if nothing had happened: the checks, and the programs they are made on."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np

from pagelens.linux import maps
from pagelens.linux.memory import read_into
from pagelens.linux.procfs import Process
from pagelens.vm.errors import TargetGoneError
from pagelens.vm.vma import Prot


class Steady:
    """subjects/steady.c: ends itself at the first wrong register, early wait or lost signal."""

    def __init__(self, program: Path) -> None:
        self._child = subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdout
        self.pid = int(self._child.stdout.readline())

    def check(self) -> list[int]:
        """Its counters (signals, threads, rounds, waits); asserts that nothing went wrong."""
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write(b"check\n")
        self._child.stdin.flush()
        words = self._child.stdout.readline().split()
        assert words[:1] == [b"ok"], words
        return [int(w) for w in words[1:]]

    def goes_on(self) -> None:
        """Waits until every part of it has made progress; asserts that it does, and without a fault."""
        start = self.check()
        for _ in range(300):
            time.sleep(0.02)
            if all(b > a for a, b in zip(start, self.check(), strict=True)):
                return
        raise AssertionError(f"stands still: {start} -> {self.check()}")

    def close(self) -> None:
        self._child.kill()
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()

    def __enter__(self) -> Steady:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def assert_untouched(pid: int) -> None:
    """Not traced, nothing registered, no signal blocked that was not, code as in its files."""
    with Process.open(pid) as proc:
        for tid in proc.tasks():
            try:
                text = proc.read_task(tid, "status").decode()
            except TargetGoneError:
                continue  # it ended meanwhile
            status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            assert status["TracerPid"] == "0", status
            assert status["State"][0] not in "tT", status["State"]
        for line in proc.read("smaps").decode().splitlines():
            if line.startswith("VmFlags:"):
                flags = line.split()[1:]
                assert "uw" not in flags
                assert "um" not in flags
        for vma in maps.read(proc):
            if vma.prot & Prot.EXEC and vma.name.startswith("/") and not vma.name.endswith(" (deleted)"):
                memory = np.zeros(vma.size, np.uint8)
                got = read_into(pid, vma.start, memory)
                with Path(vma.name).open("rb") as file:
                    file.seek(vma.offset)
                    text = file.read(vma.size)
                assert memory[:got].tobytes()[: len(text)] == text[:got], vma
