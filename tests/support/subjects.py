"""Subject programs: small C programs, compiled once a session, that do exactly what a test then asserts."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "subjects"


class Subjects:
    """Compiles tests/support/subjects/NAME.c on first use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, name: str, *flags: str) -> Path:
        """Path of the compiled program. `flags` go to gcc after the defaults (-O1 -g -pthread)."""
        tag = "".join(c if c.isalnum() else "_" for c in "".join(flags))
        out = self._directory / f"{name}{tag}"
        if not out.exists():
            command = [
                "gcc",
                "-O1",
                "-g",
                "-Wall",
                "-pthread",
                "-o",
                str(out),
                str(SOURCES / f"{name}.c"),
                *flags,
            ]
            subprocess.run(command, check=True, capture_output=True, text=True)
        return out
