"""Subject programs of the cases: compiled once for each version of their source, told on stdin what to do
next."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from pagelens.linux.symbols import cache_dir
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError

SOURCES = Path(__file__).parent / "subjects"


def build(name: str, *flags: str) -> Path:
    """Path of the compiled subject `name`. CapabilityMissingError without a C compiler.

    It is written to disk (fsync): a file whose pages are still dirty in the page cache would show them as
    dirty in every process that maps them.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CapabilityMissingError(
            "the case needs a C compiler for its subject program",
            capability="cc",
            fix="sudo apt-get install -y gcc",
        )
    source = SOURCES / f"{name}.c"
    tag = hashlib.sha256(source.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    out = cache_dir().parent / "subjects" / f"{name}-{tag}" / name
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(f"{name}.{os.getpid()}")
        command = [compiler, "-O0", "-g", "-Wall", "-pthread", "-o", str(aside), str(source), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CapabilityMissingError(
                f"{name}.c cannot be compiled: {done.stderr.strip()[:200]}", capability="cc"
            )
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(out)
    return out


class Subject:
    """A running subject, recorded into `capture` if one is given. Use as a context manager."""

    def __init__(self, program: Path, *arguments: str, capture: Path | None = None) -> None:
        command = [str(program), *arguments]
        if capture is not None:
            run = [sys.executable, "-m", "pagelens.cli.main", "run", "-c", str(capture), "--force"]
            command = [*run, "--", *command]
        environment = dict(os.environ)
        here = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(
            [here, *environment.get("PYTHONPATH", "").split(os.pathsep)]
        )
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        self.pid = int(self._line())

    def _line(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline().decode()
        if not line:
            error = self._child.stderr.read().decode().strip() if self._child.stderr else ""
            raise TargetGoneError(f"the subject program did not start: {error or 'no message'}")
        return line

    def tell(self, word: str) -> str:
        """One command; returns the answer when it is done and the subject sleeps again."""
        assert self._child.stdin is not None
        self._child.stdin.write(word.encode() + b"\n")
        self._child.stdin.flush()
        return self._line().strip()

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
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.terminate()
            self._child.wait()
        for stream in (self._child.stdout, self._child.stderr):
            if stream is not None:
                stream.close()
