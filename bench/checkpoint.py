"""Checkpoints against their limits and peers, in one run.

    python bench/checkpoint.py [--mib 512] [--quick]

1. Full dump: process_vm_readv alone into a warm buffer is the limit; the time that the target stands still, and
   the whole dump into memory-backed files, are set against it. Peer: gcore.
2. Increment of a 1 GiB process of which 1 % (scattered pages) was written: how long it stands still.
3. Rollback of N written pages against memcpy of N pages in one process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - after the path of the tree, likewise below

from pagelens.checkpoint.dump import dump  # noqa: E402 - see above
from pagelens.checkpoint.fast import Checkpoint  # noqa: E402 - see above
from pagelens.checkpoint.tracked import Watched  # noqa: E402 - see above
from pagelens.linux import pagecopy  # noqa: E402 - see above
from pagelens.linux.hold import Held  # noqa: E402 - see above
from support.puppet import PAGE, Puppet  # noqa: E402 - see above
from support.subjects import Subjects  # noqa: E402 - see above


class Stopped:
    """CPU seconds of this thread from the first stop of a target until it runs again: on a machine with other
    work, the wall time between says more of that work."""

    seconds = 0.0
    _began = 0.0

    @classmethod
    def install(cls) -> None:
        """Time every Held from here on."""
        enter, release = Held.__enter__, Held.release

        def timed_enter(held: Held) -> Held:
            cls._began = time.thread_time()
            return enter(held)

        def timed_release(held: Held) -> None:
            release(held)
            cls.seconds = time.thread_time() - cls._began

        Held.__enter__ = timed_enter
        Held.release = timed_release


def settle(pid: int) -> None:
    """Wait until the puppet stands in read(2) again."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.0002)


def fill(puppet: Puppet, pages: int) -> int:
    """A mapping of `pages` pages, each written."""
    addr = puppet.mmap(pages)
    puppet.write(addr, pages)
    settle(puppet.pid)
    return addr


def best(times: list[float]) -> float:
    """The least disturbed run: the machine is shared."""
    return min(times)


def full(puppet: Puppet, addr: int, pages: int, directory: Path, rounds: int) -> dict[str, float]:
    """Raw read, stop and whole dump, seconds (the best of `rounds`): CPU time, and wall time."""
    raw, frozen, total, raw_wall, frozen_wall = [], [], [], [], []
    buffer = pagecopy.buffer(pages)
    start, count = np.array([addr], np.uint64), np.array([pages], np.uint64)
    with pagecopy.MemoryFile(puppet.pid) as mem:
        pagecopy.read(puppet.pid, mem, start, count, buffer)
        for _ in range(rounds):
            began, wall = time.thread_time(), time.perf_counter()
            pagecopy.read(puppet.pid, mem, start, count, buffer)
            raw.append(time.thread_time() - began)
            raw_wall.append(time.perf_counter() - wall)
    del buffer
    for number in range(rounds):
        done = dump(puppet.pid, directory / f"d{number}", level=0)
        frozen.append(Stopped.seconds)
        frozen_wall.append(done.stopped_ns / 1e9)
        total.append(done.total_ns / 1e9)
        shutil.rmtree(directory / f"d{number}")
    out = {"raw_cpu_s": best(raw), "stopped_cpu_s": best(frozen)}
    out["stopped_ratio_cpu"] = out["raw_cpu_s"] / out["stopped_cpu_s"]
    out |= {"raw_wall_s": best(raw_wall), "stopped_wall_s": best(frozen_wall), "total_wall_s": best(total)}
    out["stopped_ratio_wall"] = out["raw_wall_s"] / out["stopped_wall_s"]
    return out


def gcore(pid: int, directory: Path) -> float | None:
    """Seconds that gcore takes (the process stands still nearly all of it); None without gcore."""
    if shutil.which("gcore") is None:
        return None
    began = time.perf_counter()
    subprocess.run(["gcore", "-o", directory / "core", str(pid)], check=True, capture_output=True)
    took = time.perf_counter() - began
    (directory / f"core.{pid}").unlink()
    return took


def increments(puppet: Puppet, addr: int, pages: int, directory: Path, rounds: int) -> dict[str, float]:
    """Stopped time of increments with every 100th page written, ms."""
    stopped: list[float] = []
    cpu: list[float] = []
    captured = 0
    with Watched(puppet.pid) as watched:
        watched.take(directory / "i0", None, level=0)
        for number in range(1, rounds + 1):
            puppet.tell("write", addr, pages * PAGE, 100 * PAGE, number % 256)
            settle(puppet.pid)
            done = watched.take(directory / f"i{number}", directory / f"i{number - 1}", level=0)
            stopped.append(done.stopped_ns / 1e6)
            cpu.append(Stopped.seconds * 1e3)
            captured = done.captured_pages
    for path in directory.glob("i*"):
        shutil.rmtree(path)
    return {
        "best_cpu_ms": min(cpu),
        "best_wall_ms": min(stopped),
        "median_wall_ms": statistics.median(stopped),
        "captured_pages": captured,
    }


def rollbacks(subjects: Subjects, rounds: int) -> list[dict[str, object]]:
    """Held time of a rollback of N written pages beside memcpy of N pages laid out alike, µs (best of many)."""
    out: list[dict[str, object]] = []
    most = 4096
    with Puppet(subjects("puppet")) as puppet:
        addr = fill(puppet, 2 * most)
        memory = np.zeros((2 * most, PAGE), np.uint8)
        saved = np.random.default_rng(1).integers(0, 255, (2 * most, PAGE), np.uint8)
        with Checkpoint.take(puppet.pid, watch=False) as point:
            for stride, pages in ((1, 0), (1, 1), (1, 16), (1, 256), (1, most), (2, 256), (2, most)):
                copies, held, cpu = [], [], []
                for _ in range(rounds * (10 if pages <= 256 else 1)):
                    began = time.process_time()
                    memory[: pages * stride : stride] = saved[: pages * stride : stride]
                    copies.append((time.process_time() - began) * 1e6)
                    if pages:
                        puppet.tell("write", addr, pages * stride * PAGE, stride * PAGE, 9)
                        settle(puppet.pid)
                    began = time.process_time()
                    done = point.rollback()
                    cpu.append((time.process_time() - began) * 1e6)
                    held.append(done.held_ns / 1e3)
                    assert done.fast
                    assert done.written_pages >= pages
                out.append(
                    {
                        "pages": pages,
                        "layout": "adjacent" if stride == 1 else "every other page",
                        "memcpy_cpu_us": min(copies),
                        "held_wall_us": min(held),
                        "rollback_cpu_us": min(cpu),
                        "held_wall_median_us": statistics.median(held),
                        "allowed_us": 2 * min(copies) + 200,
                    }
                )
    return out


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512, help="size of the process of part 1")
    parser.add_argument("--quick", action="store_true", help="small: only to see that it runs")
    args = parser.parse_args()
    rounds = 2 if args.quick else 7
    results: dict[str, object] = {}
    Stopped.install()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        subjects = Subjects(directory)
        pages = (32 if args.quick else args.mib) * 256
        with Puppet(subjects("puppet")) as puppet:
            addr = fill(puppet, pages)
            results["full"] = full(puppet, addr, pages, directory, rounds)
            results["gcore_s"] = gcore(puppet.pid, directory)
        pages = 8192 if args.quick else 262144
        with Puppet(subjects("puppet")) as puppet:
            addr = fill(puppet, pages)
            results["increment"] = increments(puppet, addr, pages, directory, rounds)
        results["rollback"] = rollbacks(subjects, 5 if args.quick else 50)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
