"""Subject programs: small C programs, compiled once, that do exactly what a test then asserts.

A compiled program is kept by the hash of its source, in the user's cache: compiling under emulation takes
seconds, so virtual machines are handed what was compiled here (`python -m support.subjects DIR` fills a
directory for them).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "subjects"
DEFAULT_FLAGS = ("-O1", "-g", "-Wall", "-pthread")


def _cache() -> Path:
    given = os.environ.get("PAGELENS_SUBJECTS")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "pagelens" / "subjects"


def _home(name: str) -> Path:
    # Headers count too: a subject may include one.
    digest = hashlib.sha256(" ".join(DEFAULT_FLAGS).encode())
    for source in [SOURCES / f"{name}.c", *sorted(SOURCES.glob("*.h"))]:
        digest.update(source.read_bytes())
    return Path(f"{name}-{digest.hexdigest()[:12]}")


class Subjects:
    """Compiles tests/support/subjects/NAME.c on first use."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or _cache()

    def __call__(self, name: str, *flags: str) -> Path:
        """Path of the compiled program. `flags` go to gcc after the defaults (-O1 -g -pthread)."""
        tag = "".join(c if c.isalnum() else "_" for c in "".join(flags))
        out = self._directory / _home(name) / f"{name}{tag}"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
                new = Path(scratch) / out.name
                command = ["gcc", *DEFAULT_FLAGS, "-o", str(new), str(SOURCES / f"{name}.c"), *flags]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    raise AssertionError(f"{name}.c does not compile:\n{done.stderr}")
                new.rename(out)  # whole or not at all: another session may compile it at the same time
        return out


def prepare(target: Path) -> None:
    """Compiles every subject, and copies all builds of the present sources to `target`, for a guest."""
    build = Subjects()
    for source in SOURCES.glob("*.c"):
        with contextlib.suppress(AssertionError):  # one that needs flags of its own: its test gives them
            build(source.stem)
        home = _home(source.stem)
        if (_cache() / home).is_dir():
            # Directories in it are another session's compiler at work.
            (target / home).mkdir(parents=True, exist_ok=True)
            for built in (_cache() / home).iterdir():
                if built.is_file():
                    shutil.copy2(built, target / home / built.name)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
