"""Long runs whose results stand in docs/checkpoint.md: byte truth of many checkpoints, many rollbacks.

    python tools/checkpoint_truth.py dump 2000 [--seconds S]     checkpoints of a program that writes all the time
    python tools/checkpoint_truth.py rollback 100000             rollbacks, the state checked each time

Every checkpoint is checked against the program's own invariant (tests/support/scribe.py) and verified to the bit;
older ones of the chain are read again at random. After every rollback the process's own registers and all its
writable memory are compared with what was saved.
"""

from __future__ import annotations

import argparse
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - after the path of the tree, likewise below

from pagelens.checkpoint.fast import Checkpoint  # noqa: E402 - see above
from pagelens.checkpoint.image import Kind, per_page  # noqa: E402 - see above
from pagelens.checkpoint.incremental import Chain  # noqa: E402 - see above
from pagelens.checkpoint.stored import Stored  # noqa: E402 - see above
from pagelens.checkpoint.verify import verify  # noqa: E402 - see above
from pagelens.linux import pagecopy  # noqa: E402 - see above
from support.puppet import MADV, PAGE, Puppet  # noqa: E402 - see above
from support.scribe import Scribe, process_state  # noqa: E402 - see above
from support.subjects import Subjects  # noqa: E402 - see above


def dumps(count: int, directory: Path, subjects: Subjects) -> None:
    """`count` checkpoints in chains of 20, each checked; a random older one too."""
    rng = random.Random(1)
    stopped, bad = [], 0
    began = time.monotonic()
    made = 0
    with Scribe(subjects("scribe"), 3, 24, directory / "file") as scribe:
        while made < count:
            chain_dir = directory / "chain"
            with Chain(scribe.pid, chain_dir) as chain:
                steps: list[tuple[Path, int]] = []
                for done in chain.run(0.0, min(20, count - made)):
                    made += 1
                    steps.append((done.path, scribe.check(Stored.open(done.path).read)))
                    bad += not verify(done.path).ok
                    path, then = rng.choice(steps)
                    bad += scribe.check(Stored.open(path).read) != then
                    stopped.append(done.stopped_ns)
            shutil.rmtree(chain_dir)
        state = process_state(scribe.pid)
    print(
        f"{made} checkpoints, 3 writing threads, {bad} wrong; target after: State {state[0]}, TracerPid {state[1]}; "
        f"stopped median {statistics.median(stopped) / 1e6:.2f} ms, "
        f"99 % {sorted(stopped)[len(stopped) * 99 // 100] / 1e6:.1f} ms; "
        f"{time.monotonic() - began:.0f} s"
    )


def rollbacks(count: int, subjects: Subjects) -> None:
    """`count` rollbacks of a program that writes, drops and reads pages in between; compared each time."""
    rng = random.Random(2)
    wrong = slow = 0
    held = []
    began = time.monotonic()
    with Puppet(subjects("puppet")) as puppet:
        area = puppet.island(32)
        puppet.write(area, 20, value=3)
        puppet.tell("malloc", 100)
        while process_state(puppet.pid)[0] != "S":
            pass
        with Checkpoint.take(puppet.pid, watch=False) as point, pagecopy.MemoryFile(puppet.pid) as mem:
            image = point._image
            assert image is not None
            rseq = {t.rseq[0] & ~0xFFF for t in image.process.threads if t.rseq is not None}
            flat = per_page(image.rows)
            flat = flat[
                (flat["kind"] == Kind.DATA) & ~np.isin(flat["start"], np.array(sorted(rseq), np.uint64))
            ]
            ones = np.ones(len(flat), np.uint64)
            saved = image.hashes(image.locate(flat["start"]))
            buffer = pagecopy.buffer(len(flat))
            for _ in range(count):
                where = area + rng.randrange(24) * PAGE
                match rng.randrange(8):
                    case 0:
                        puppet.sys("madvise", where, 2 * PAGE, MADV["DONTNEED"])
                    case 1:
                        puppet.tell("read", where, 4 * PAGE, PAGE)
                    case _:
                        puppet.write(where, rng.randrange(1, 5), value=rng.randrange(256))
                done = point.rollback()
                slow += not done.fast
                held.append(done.held_ns)
                pagecopy.read(puppet.pid, mem, flat["start"], ones, buffer)
                wrong += bool((pagecopy.hash_pages(buffer)[0] != saved).any())
        answer = puppet.tell("read", area, 32 * PAGE, PAGE)[0]
        wrong += answer != 60
        state = process_state(puppet.pid)
    print(
        f"{count} rollbacks, {len(flat)} pages compared after each, {wrong} wrong, {slow} by the general way; target "
        f"after: TracerPid {state[1]}; held median {statistics.median(held) / 1e3:.0f} µs; "
        f"{time.monotonic() - began:.0f} s"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("dump", "rollback"))
    parser.add_argument("count", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        subjects = Subjects(directory)
        if args.what == "dump":
            dumps(args.count, directory, subjects)
        else:
            rollbacks(args.count, subjects)
    print(f"kernel {platform.release()}")


if __name__ == "__main__":
    main()
