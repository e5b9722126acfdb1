"""Kill pagelens at random moments of checkpoints and rollbacks, and see what becomes of target and store.

A worker is forked from a process that has imported everything, so that a random moment of it is one of the work and
not of its start. Of a rollback it says in shared memory where it stands: before the first change (0), between the
first and the last (1), after it (2). Only in state 1 may the target come to harm, and even then it must run on,
untraced (docs/checkpoint.md).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pagelens.checkpoint import rollback as slow
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.fast import Checkpoint
from pagelens.checkpoint.incremental import Chain
from pagelens.checkpoint.state import prepare
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.verify import verify
from pagelens.linux.hold import Held
from pagelens.linux.memory import read_memory
from pagelens.vm.errors import PagelensError
from support.scribe import Scribe, process_state
from support.subjects import Subjects
from support.unharmed import Steady, assert_untouched


def kill_at_random(
    work: Callable[[], None], rng: random.Random, most: float, begun: Callable[[], bool] = lambda: True
) -> None:
    """Run `work` in a forked process and SIGKILL it up to `most` seconds after it has `begun` (20 s at the most)."""
    worker = os.fork()
    if worker == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    deadline = time.monotonic() + 20
    while not begun() and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(rng.random() * most)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


def of_checkpoints(kills: int, subjects: Subjects, directory: Path, rng: random.Random) -> Counter[str]:
    """Kill full, incremental and watched checkpoints of a program that notices any disturbance. Asserts that it goes
    on unharmed and that what lies on disk verifies. The counter says how many of each.

    One thing is allowed and counted as "EINTR": killed between a thread's stop and the look at its registers that
    follows, pagelens leaves an epoll_wait that ends as it does after SIGSTOP and SIGCONT (docs/checkpoint.md).
    """
    seen: Counter[str] = Counter()
    while not seen["whole after"]:
        seen["targets"] += 1
        place = directory / f"target{seen['targets']}"
        place.mkdir()
        with Steady(subjects("steady")) as steady:
            dump(steady.pid, place / "parent")
            while kills:
                kills -= 1
                _one_checkpoint(steady, place, seen, rng)
                said = _complaint(steady)
                if said:
                    assert said == ["WRONG", "wait", "4"], said
                    seen["EINTR"] += 1
                    break
            else:
                assert_untouched(steady.pid)
                # What the dead left is no obstacle.
                seen["whole after"] = dump(steady.pid, place / "out", force=True).complete
                steady.goes_on()
    return seen


def _complaint(steady: Steady) -> list[str]:
    try:
        steady.goes_on()
    except AssertionError as error:
        words = error.args[0] if error.args else None
        found = re.findall(r"b'(\w+)'", str(words))
        if found[:1] != ["WRONG"]:
            raise
        return found
    return []


def _one_checkpoint(steady: Steady, place: Path, seen: Counter[str], rng: random.Random) -> None:
    out, chains = place / "out", place / f"chain{seen.total()}"

    def full() -> None:
        while True:
            dump(steady.pid, out, force=True)

    def increment() -> None:
        while True:
            dump(steady.pid, out, parent=place / "parent", force=True)

    def chain() -> None:
        with Chain(steady.pid, chains, keep=3) as made:
            for _ in made.run(0.0):
                pass

    work = rng.choice((full, increment, chain))
    kill_at_random(work, rng, 0.4)
    seen[work.__name__] += 1
    with contextlib.suppress(FileNotFoundError):
        assert process_state(steady.pid)[1] == 0
    for path in (out, *chains.glob("[0-9]*")):
        # A pruned one loses its manifest first; without it nobody takes the rest for a checkpoint.
        if (path / "manifest.json").exists():
            verdict = verify(path)
            assert verdict.ok, verdict.problems
            seen["verified"] += 1


def of_rollbacks(
    kills: int, subjects: Subjects, directory: Path, rng: random.Random, *, fast: bool = False
) -> Counter[str]:
    """Kill rollbacks of a program whose threads write all the time. The counter: killed before, between, after;
    of those between: harmed."""
    seen: Counter[str] = Counter()
    stage = mmap.mmap(-1, 4096)
    prepare()
    run = slow._Job.run

    def told(job: slow._Job) -> None:
        stage[0] = 1
        run(job)
        stage[0] = 2

    while kills:
        seen["targets"] += 1
        place = directory / f"target{seen['targets']}"
        place.mkdir()
        with Scribe(subjects("scribe"), 2, 8, place / "file") as scribe:
            dump(scribe.pid, place / "c")
            saved = Stored.open(place / "c")
            scribe.check(saved.read)

            def again_and_again(pid: int = scribe.pid, saved: Stored = saved) -> None:
                slow._Job.run = told  # type: ignore[method-assign]
                while True:
                    stage[0] = 0
                    slow.rollback(pid, saved)
                    stage[0] = 0
                    time.sleep(0.002)

            def quickly(pid: int = scribe.pid) -> None:
                with Checkpoint.take(pid, watch=False) as point:
                    while True:
                        stage[0] = 1
                        point.rollback()
                        stage[0] = 0
                        time.sleep(0.0002)

            while kills:
                stage[0] = 0
                # Two of three from about the first change on: a rollback spends most of its time before it.
                if rng.randrange(3):
                    kill_at_random(quickly if fast else again_and_again, rng, 0.003, lambda: stage[0] == 1)
                else:
                    kill_at_random(quickly if fast else again_and_again, rng, 0.15)
                kills -= 1
                where = ("before", "between", "after")[stage[0]]
                seen[where] += 1
                with contextlib.suppress(FileNotFoundError):
                    letter, tracer = process_state(scribe.pid)
                    assert tracer == 0
                    assert letter not in "tT"
                if not _sound(scribe):
                    assert where == "between", f"killed {where} the changes, and the target is not sound"
                    seen["harmed"] += 1
                    break
    return seen


def _sound(scribe: Scribe) -> bool:
    # Its memory is of one instant, and it goes on.
    try:
        steps = []
        for _ in range(2):
            with Held(scribe.pid):
                steps.append(scribe.check(lambda addr, length: read_memory(scribe.pid, addr, length)))
            deadline = time.monotonic() + 20
            while len(steps) == 1 and time.monotonic() < deadline:
                time.sleep(0.005)
                with Held(scribe.pid):
                    now = scribe.check(lambda addr, length: read_memory(scribe.pid, addr, length))
                if now > steps[0]:
                    break
    except (AssertionError, PagelensError, OSError, ValueError):
        return False
    return steps[1] > steps[0]
