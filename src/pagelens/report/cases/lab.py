"""The laboratory of the cases: compiles subject programs, records them as a user would, talks to them in
steps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pagelens.capture.reader import Capture
from pagelens.vm.errors import CapabilityMissingError, PagelensError

SUBJECTS = Path(__file__).parent / "subjects"


@dataclass(slots=True)
class Answer:
    """What a case found.

    lines: (tag, text), the answer as it is told. figures: the measured values behind it. evidence: events of
    the capture (seq, what). method, complete, notes: as everywhere. missing: what could not be had here, and
    why.
    """

    number: int
    question: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    evidence: list[dict[str, Any]] = field(default_factory=list)
    method: str = ""
    complete: bool = True
    missing: list[str] = field(default_factory=list)
    reproduce: str = ""
    headline: str = ""  # stands behind the question

    def say(self, tag: str, text: str) -> None:
        """Add a line."""
        self.lines.append((tag, text))


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded program: its output, and the capture."""

    returncode: int
    stdout: str
    capture: Capture


class Stepped:
    """A program that prints a line at each stage and waits for one on stdin before it goes on."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: dict[str, str] = {}
        self.times: dict[str, int] = {}

    def until(self, stage: str) -> dict[str, str]:
        """Read up to the line "stage NAME key=value …"; other lines' pairs are kept too."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            words = line.split()
            self.said |= dict(w.split("=", 1) for w in words if "=" in w)
            if words[:2] == ["stage", stage]:
                self.times[stage] = time.monotonic_ns()
                return self.said
        raise PagelensError(f"the subject program ended before its stage {stage!r}")

    def go(self) -> None:
        """Let it run on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> int:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(30)


class Lab:
    """A directory of one's own, and the tools. Use with `with`."""

    def __init__(self) -> None:
        self.root = os.geteuid() == 0
        self.brief = ""

    def __enter__(self) -> Lab:
        self._directory = tempfile.TemporaryDirectory(prefix="pagelens-case-")
        self.path = Path(self._directory.name)
        self._running: list[subprocess.Popen[str]] = []
        self._why_not: str | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._directory.cleanup()

    def compile(self, name: str, *flags: str) -> Path:
        """The subject program NAME. CapabilityMissingError without a C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise CapabilityMissingError(
                "no C compiler", capability="cc", fix="sudo apt-get install -y gcc libc6-dev"
            )
        out = self.path / name
        command = [compiler, "-O1", "-g", "-pthread", "-o", str(out), str(SUBJECTS / f"{name}.c"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = (done.stderr.splitlines() or ["?"])[0]
            raise CapabilityMissingError(f"{name}.c cannot be compiled: {first}", capability="cc")
        # Written out, so that its pages in the page cache are clean, as those of any installed program.
        with open(out, "rb") as stream:
            os.fsync(stream.fileno())
        return out

    def can_record(self) -> str:
        """Empty where whole recordings work, else why not. Tried once. `brief` stands in for a reason told
        before."""
        if self._why_not is None:
            done = subprocess.run(
                [*self._command(self.path / "probe.plens", "--method", "bpf", "--snapshot", "none"), "true"],
                capture_output=True,
                text=True,
                check=False,
            )
            lines = done.stderr.strip().splitlines()
            last = lines[-1].removeprefix("pagelens: ") if lines else "run failed"
            self._why_not = "" if done.returncode == 0 else last
        return self.brief if self._why_not and self.brief else self._why_not

    @staticmethod
    def _command(capture: Path, *flags: str) -> list[str]:
        return [
            sys.executable, "-m", "pagelens.cli.main", "run", "-q", "--force", "-c", str(capture), *flags, "--",
        ]  # fmt: skip

    def _recording(self) -> tuple[str, ...]:
        why = self.can_record()
        if why:
            raise CapabilityMissingError(why, capability="record")
        return ("--method", "bpf")

    def record(
        self, command: Sequence[str | Path], *flags: str, name: str = "capture", partly: bool = False
    ) -> Recorded:
        """Run a command under `pagelens run`. partly: also by a method that sees less (own processes, no
        privilege). CapabilityMissingError where that does not work."""
        path = self.path / f"{name}.plens"
        how = ("--method", "auto") if partly else self._recording()
        done = subprocess.run(
            [*self._command(path, *how, *flags), *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 125:
            raise CapabilityMissingError(done.stderr.strip().removeprefix("pagelens: "), capability="record")
        return Recorded(done.returncode, done.stdout, Capture(path))

    def start(self, command: Sequence[str | Path], *, recorded: str = "") -> Stepped:
        """Start a stepped program; recorded: name of its capture ("" = not recorded)."""
        words = [*map(str, command)]
        if recorded:
            words = [*self._command(self.path / f"{recorded}.plens", *self._recording()), *words]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._running.append(process)
        return Stepped(process)

    def capture(self, name: str) -> Capture:
        """A capture that `start` made."""
        return Capture(self.path / f"{name}.plens")


def completeness(capture: Capture) -> str:
    """The equation of a capture as a phrase."""
    faults = (capture.meta.get("summary") or {}).get("faults") or {}
    recorded, gup, lost = (faults.get(k, 0) for k in ("recorded", "gup", "lost"))
    counted = faults.get("counted_minor", 0) + faults.get("counted_major", 0)
    unseen = faults.get("kernel_mode_unseen", 0)
    sign = "=" if recorded + gup + lost + unseen == counted and not lost else "≠"
    part = f" + {unseen:,} unseen" if unseen else ""
    return f"{recorded:,} recorded + {gup:,} gup{part} {sign} {counted:,} counted, lost {lost:,}"
