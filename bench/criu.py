"""Checkpoints beside CRIU's and gcore, in one run: how long the process stands still, and how long it takes in all.

    ./dev in-kernel --memory 4096 --timeout 900 6.12 -- python bench/criu.py [--mib 256]

CRIU's increments need soft-dirty, which the guests' kernels have. The subject is a Python process with one mapping
of which 1 % of the pages (scattered) is written before each increment; each tool writes into memory-backed files and
leaves the process running. CRIU's own statistics say how long it was frozen; gcore holds it nearly all of the time.
At the end the images that CRIU made, with their parent, are read by `checkpoint.criu` and compared with the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]

from pagelens.checkpoint.criu import CriuPages  # noqa: E402 - after the path of the tree, likewise below
from pagelens.checkpoint.dump import dump  # noqa: E402 - see above
from pagelens.checkpoint.protobuf import fields  # noqa: E402 - see above
from pagelens.checkpoint.tracked import Watched  # noqa: E402 - see above
from pagelens.vm.errors import CapabilityMissingError  # noqa: E402 - see above

PAGE = 4096
SUBJECT = """
import ctypes, mmap, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
size = int(sys.argv[1]) << 20
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, size, 4096):
    area[at:at + 8] = (at + 1).to_bytes(8, "little")
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
turn = 0
while True:
    signal.sigwait({signal.SIGUSR1})
    turn += 1
    for at in range(0, size, 409600):
        area[at + 8:at + 16] = turn.to_bytes(8, "little")
    print("done", turn, flush=True)
"""


class Subject:
    """The process: a session of its own, no terminal, no pipes (CRIU asks for that). Killed at the end."""

    def __init__(self, mib: int, directory: Path) -> None:
        self.out = directory / "subject.out"
        with self.out.open("wb") as out:
            self.child = subprocess.Popen(
                [sys.executable, "-c", SUBJECT, str(mib)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        self.pid = self.child.pid
        self.turns = 0
        self._until(1)
        self.area = int(self.out.read_text().split()[0])

    def _until(self, lines: int) -> None:
        while self.out.read_text().count("\n") < lines:
            assert self.child.poll() is None, "the subject ended"
            time.sleep(0.02)
        time.sleep(0.2)  # it waits for the next signal again

    def write(self) -> None:
        """Let it write 1 % of its pages, and wait until it has."""
        self.child.send_signal(signal.SIGUSR1)
        self.turns += 1
        self._until(1 + self.turns)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()


def stats(images: Path) -> dict[str, float]:
    """Milliseconds from CRIU's stats-dump (stats.proto: dump_stats_entry, times in µs)."""
    data = (images / "stats-dump").read_bytes()[8:]
    size = int.from_bytes(data[:4], "little")
    entry = dict(fields(data[4 : 4 + size]))[1]
    assert isinstance(entry, bytes)
    names = {1: "freezing_ms", 2: "frozen_ms", 3: "memdump_ms", 4: "memwrite_ms"}
    return {names[k]: int(v) / 1e3 for k, v in fields(entry) if k in names and isinstance(v, int)}


def criu(pid: int, action: str, images: Path, parent: Path | None = None) -> dict[str, float]:
    """One pre-dump or dump that leaves the process running; times in ms."""
    images.mkdir()
    command = ["criu", action, "-t", str(pid), "-D", str(images), "--track-mem", "-v1", "-o", "log"]
    if action == "dump":
        command += ["--leave-running"]
    if parent is not None:
        command += ["--prev-images-dir", f"../{parent.name}"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = (time.perf_counter() - began) * 1e3
    if done.returncode:
        log = (images / "log").read_text() if (images / "log").exists() else ""
        raise SystemExit(f"criu {action} failed:\n{done.stderr}{log[-2000:]}")
    return {"total_ms": took, **stats(images)}


def gcore(pid: int, directory: Path) -> dict[str, float]:
    """The whole of gcore; the process is held nearly all of that time."""
    began = time.perf_counter()
    subprocess.run(["gcore", "-o", directory / "core", str(pid)], check=True, capture_output=True)
    took = (time.perf_counter() - began) * 1e3
    (directory / f"core.{pid}").unlink()
    return {"total_ms": took}


def best(runs: int, one: Callable[[int], dict[str, float]]) -> dict[str, float]:
    """The run with the shortest total."""
    return min((one(number) for number in range(runs)), key=lambda result: result["total_ms"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if shutil.which("criu") is None:
        raise SystemExit("missing capability: criu (the guests of ./dev in-kernel have it)")
    results: dict[str, object] = {"kernel": platform.release(), "mib": args.mib}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        with Subject(args.mib, directory) as subject:
            pid = subject.pid

            def ours(number: int) -> dict[str, float]:
                done = dump(pid, directory / f"ours{number}", level=0)
                shutil.rmtree(directory / f"ours{number}")
                return {"total_ms": done.total_ns / 1e6, "stopped_ms": done.stopped_ns / 1e6}

            def theirs(number: int) -> dict[str, float]:
                found = criu(pid, "dump", directory / f"full{number}")
                shutil.rmtree(directory / f"full{number}")
                return found

            results["full"] = {
                "pagelens": best(args.rounds, ours),
                "criu dump": best(args.rounds, theirs),
                "gcore": gcore(pid, directory) if shutil.which("gcore") else None,
            }
            results["increment, 1 % written"] = {
                "pagelens": increments(subject, directory, args.rounds),
                **criu_increments(subject, directory, args.rounds),
            }
            results["read back"] = compare(directory / "last", subject, args.mib)
    print(json.dumps(results, indent=1))


def increments(subject: Subject, directory: Path, rounds: int) -> object:
    """Ours; the reason where the process cannot be watched."""
    try:
        with Watched(subject.pid) as watched:
            watched.take(directory / "w0", None, level=0)

            def one(number: int) -> dict[str, float]:
                subject.write()
                done = watched.take(directory / f"w{number + 1}", directory / f"w{number}", level=0)
                return {
                    "total_ms": done.total_ns / 1e6,
                    "stopped_ms": done.stopped_ns / 1e6,
                    "stored_pages": done.stored_pages,
                }

            return best(rounds, one)
    except CapabilityMissingError as error:
        return str(error)
    finally:
        for path in directory.glob("w*"):
            shutil.rmtree(path)


def criu_increments(subject: Subject, directory: Path, rounds: int) -> dict[str, object]:
    """Pre-dump, first whole and then with a parent, and a dump with a parent, 1 % of the pages written between."""
    first = criu(subject.pid, "pre-dump", directory / "p0")
    last = directory / "p0"

    def again(number: int) -> dict[str, float]:
        nonlocal last
        subject.write()
        found = criu(subject.pid, "pre-dump", directory / f"p{number + 1}", last)
        last = directory / f"p{number + 1}"
        return found

    repeated = best(rounds, again)
    subject.write()
    final = criu(subject.pid, "dump", directory / "last", last)
    return {"criu pre-dump, first": first, "criu pre-dump": repeated, "criu dump with parent": final}


def compare(images: Path, subject: Subject, mib: int) -> str:
    """CRIU's images, through all their parents, against what the process must hold."""
    pages = CriuPages(images, subject.pid)
    wrong = depth = 0
    for at in range(0, mib << 20, PAGE):
        page = pages.page(subject.area + at)
        turn = subject.turns if at % 409600 == 0 else 0
        expected = (at + 1).to_bytes(8, "little") + turn.to_bytes(8, "little")
        wrong += page[:16] != expected or any(page[16:])
    link = images
    while (link / "parent").is_dir():
        link, depth = link / "parent", depth + 1
    return f"{(mib << 20) // PAGE} pages through {depth} parents, {wrong} wrong"


if __name__ == "__main__":
    main()
