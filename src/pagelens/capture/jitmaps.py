"""Perf maps of the recorded processes, kept in the capture: names of JIT code outlive the process.

A runtime (node --perf-basic-prof, a JVM with an agent, python -X perf) writes /tmp/perf-PID.map. The pid
will be somebody else's later, and the file is often removed, so it is copied when the recording ends.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pagelens.capture.reader import Capture

_LIMIT = 256 << 20


def keep(path: Path, directory: Path = Path("/tmp")) -> int:
    """Copy the maps of all processes in the capture at `path` into it; returns how many there were.

    Only regular files (a link in /tmp may point anywhere), of at most 256 MiB. OSError where the capture
    cannot be written.
    """
    maps = {p.name: p for p in directory.glob("perf-*.map")}
    if not maps:
        return 0
    capture = Capture(path)
    pids = {
        *capture.table("mms", ["pid"]).column(0).to_pylist(),
        *capture.table("tasks", ["pid"]).column(0).to_pylist(),
    }
    count = 0
    for pid in sorted(pids):
        source = maps.get(f"perf-{pid}.map")
        data = _read(source) if source else None
        if data is not None:
            (path / f"perf-{pid}.map").write_bytes(data)
            count += 1
    return count


def _read(source: Path) -> bytes | None:
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _LIMIT:
            return None
        return file.read(_LIMIT)
