"""Slowdown of a write-heavy program: alone, watched by each backend, and under CRIU's pre-dump (which tracks by
soft-dirty and copies what changed). For a kernel with soft-dirty and CRIU: ./dev in-kernel 6.12 -- python
bench/dirty_criu.py. Ratios of the program's own CPU and wall time, in turn in one run, fastest of ROUNDS.

One look, or one pre-dump, each time the program has done a fifth of its work.
"""

from __future__ import annotations

import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pagelens.dirty.track import track
from pagelens.vm.errors import CapabilityMissingError

ROUNDS = 2
WRITER = """
import mmap, sys, time
m = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m.madvise(15)
for at in range(0, 16 << 20, 4096): m[at] = 1
print("x", flush=True)
for line in sys.stdin:
    cpu, wall = time.process_time(), time.monotonic()
    for part in range(5):
        for again in range(20):
            for at in range(0, 16 << 20, 4096): m[at] = again
        print("part", flush=True)
        sys.stdin.readline()
    print(time.process_time() - cpu, time.monotonic() - wall, flush=True)
"""


def run(child: subprocess.Popen[str], between: Callable[[], object]) -> tuple[float, float, float]:
    """(CPU seconds, wall seconds, seconds spent in `between`) of one job."""
    assert child.stdin
    assert child.stdout
    spent = 0.0
    child.stdin.write("go\n")
    child.stdin.flush()
    for _ in range(5):
        assert child.stdout.readline() == "part\n"
        begin = time.monotonic()
        between()
        spent += time.monotonic() - begin
        child.stdin.write("on\n")
        child.stdin.flush()
    cpu, wall = child.stdout.readline().split()
    return float(cpu), float(wall), spent


def start() -> subprocess.Popen[str]:
    """The writer, ready. Its session and files are its own, as CRIU wants them."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    select.select([child.stdout], [], [], 60)
    child.stdout.readline()
    return child


class Predump:
    """A chain of CRIU pre-dumps of one process, each with the one before as its parent."""

    def __init__(self, pid: int, directory: Path) -> None:
        self._pid = pid
        self._directory = directory
        self._made = 0

    def one(self) -> None:
        """The next pre-dump."""
        images = self._directory / str(self._made)
        images.mkdir()
        parent = ["--prev-images-dir", f"../{self._made - 1}"] if self._made else []
        command = ["criu", "pre-dump", "-t", str(self._pid), "-D", str(images), "--track-mem", "--shell-job"]
        done = subprocess.run([*command, *parent], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"criu: {done.stderr or done.stdout}")
        self._made += 1


def main() -> None:
    """The table."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    child = start()
    for _ in range(ROUNDS):
        rows.setdefault("alone", []).append(run(child, lambda: None))
        for backend in ("pagescan", "soft-dirty"):
            try:
                tracker = track(pid=child.pid, backend=backend)
            except CapabilityMissingError as error:
                print(f"{backend} is not measured: {error}", file=sys.stderr)
                continue
            with tracker:
                rows.setdefault(backend, []).append(run(child, tracker.epoch))
        if shutil.which("criu") is None:
            print("criu is not measured: it is not installed", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as name:
            dumps = Predump(child.pid, Path(name))
            dumps.one()
            rows.setdefault("criu pre-dump", []).append(run(child, dumps.one))
    child.kill()
    child.wait()
    cpu, wall, _ = (min(column) for column in zip(*rows["alone"], strict=True))
    print("| 4,096 pages written over and over | CPU time | wall time | one look |\n|---|---|---|---|")
    for name, measured in rows.items():
        c, w, spent = (min(column) for column in zip(*measured, strict=True))
        print(f"| {name} | {c / cpu:.2f} x | {w / wall:.2f} x | {spent / 5 * 1e3:.1f} ms |")


if __name__ == "__main__":
    main()
