"""Subject programs that print their pid and then do what each line of their input says, recorded or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from support.cli import ROOT


class Told:
    """A running subject; with `capture`, under `pagelens run`. Use as a context manager."""

    def __init__(self, program: Path, capture: Path | None = None) -> None:
        with program.open("rb") as file:
            # Pages of a file that was just written are dirty in the page cache, and smaps would say so.
            os.fsync(file.fileno())
        command = [str(program)]
        if capture is not None:
            run = [sys.executable, "-m", "pagelens.cli.main", "run", "-c", str(capture)]
            command = [*run, "--", *command]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self.pid = int(self.line())

    def line(self) -> str:
        """The next line of its output."""
        assert self._child.stdout is not None
        text = self._child.stdout.readline().decode()
        assert text, "the subject program ended"
        return text.strip()

    def tell(self, word: str) -> str:
        """One command; returns the answer, when it is done and the subject sleeps again."""
        assert self._child.stdin is not None
        self._child.stdin.write(word.encode() + b"\n")
        self._child.stdin.flush()
        return self.line()

    def finish(self) -> None:
        """End of input: the subject exits, the recording is completed."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._child.stdin is not None and not self._child.stdin.closed:
            self._child.stdin.close()
        self._child.wait(20)
        if self._child.stdout is not None:
            self._child.stdout.close()
