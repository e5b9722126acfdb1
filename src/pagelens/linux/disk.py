"""What is written is on disk only when the kernel has been asked (fsync(2))."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path | str) -> None:
    """fsync of a file's data, or of a directory, so that renames in it are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
