"""Starts the process of a student's code, calls it, and turns each way to fail into one sentence."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pagelens
from pagelens.lab.student import MEMORY
from pagelens.vm.closing import Closing
from pagelens.vm.errors import DamagedInputError

CPU_SECONDS = 2.0  # of one call
WALL_SECONDS = 60.0  # of one call: for code that sleeps; CPU time is what usually ends one


class Broken(Exception):
    """The code did not answer as a function should; the text is the sentence that says so."""


class Student(Closing):
    """FILE's FUNCTION in a process of its own, for page tables of `levels`. DamagedInputError where the file cannot
    be loaded."""

    def __init__(self, path: Path, function: str, seconds: float = CPU_SECONDS, levels: int = 4) -> None:
        self.function = function
        self.seconds = seconds
        self.printed = 0
        self.first = ""
        theirs_r, ours_w = os.pipe()
        ours_r, theirs_w = os.pipe()
        environ = {**os.environ, "PYTHONPATH": str(Path(pagelens.__file__).parent.parent)}
        command = [sys.executable, "-P", "-m", "pagelens.lab.student"]
        try:
            self._process = subprocess.Popen(
                [*command, str(path), function, str(theirs_r), str(theirs_w), str(seconds), str(levels)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(theirs_r, theirs_w), env=environ, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(theirs_r)
            os.close(theirs_w)
        self._calls, self._replies, self._rest = ours_w, ours_r, b""
        try:
            loaded = self._answer()
        except Broken as broken:
            self.close()
            raise DamagedInputError(f"{path} cannot be loaded: {broken}") from None
        if "no_function" in loaded:
            self.close()
            raise DamagedInputError(f"{path} has no function {function!r}")

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """One call. Broken: it did not come back with an answer."""
        data = json.dumps(request).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._calls, data) :]
        except BrokenPipeError:
            raise Broken(self._gone()) from None
        reply = self._answer()
        self.printed, self.first = reply["printed"], reply["first"]
        return reply

    def _answer(self) -> dict[str, Any]:
        reply = self._read()
        at = f" (line {reply['line']})" if reply.get("line") else ""
        if "time" in reply:
            raise Broken(f"it did not return within {self.seconds:g} s of CPU time: an endless loop?")
        if "exit" in reply:
            raise Broken("it called sys.exit; a function must return")
        if "memory" in reply:
            raise Broken(f"it needs more than the {MEMORY >> 20} MiB of memory that it may have")
        if "raised" in reply:
            raise Broken(f"it raised {reply['raised']}{at}")
        if "wrong" in reply:
            raise Broken(reply["wrong"])
        return reply

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + WALL_SECONDS
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            ready = select.select([self._replies], [], [], max(left, 0))[0]
            if not ready:
                raise Broken(f"it did not return within {WALL_SECONDS:g} s: does it wait for something?")
            data = os.read(self._replies, 1 << 20)
            if not data:
                raise Broken(self._gone())
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value

    def _gone(self) -> str:
        code = self._process.wait(10)
        if code == -signal.SIGXCPU:
            return f"it did not return within {self.seconds:g} s of CPU time: an endless loop?"
        how = f"a signal ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        return f"its process ended, by {how}"

    def close(self) -> None:
        """End the process. Twice is harmless."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for fd in (self._calls, self._replies):
            if fd >= 0:
                os.close(fd)
        self._calls = self._replies = -1
