"""The oracle of dirty tracking: a subject that says what it wrote, and the judgement of an epoch against it.

A page that must be listed and is not is a miss: never allowed. A page that is listed without need must carry
a reason that the backend declares, and the reason must fit the arena (a huge-page reason only where huge
pages are, a new mapping only where one is new).
"""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagelens.dirty import spans
from pagelens.dirty.epoch import Epoch, Why
from pagelens.dirty.spans import Spans
from pagelens.vm.units import PAGE_SIZE


@dataclass
class Truth:
    """What the subject did since the last question."""

    arenas: list[tuple[int, int, str, int]] = field(default_factory=list)  # start, end, kind, fresh
    must: Spans = spans.EMPTY
    moves: int = 0


@dataclass
class Verdict:
    """missed: pages. extra: pages by reason, only reasons that are allowed. wrong: [(address, pages, reason)]
    listed for no allowed reason."""

    must: int
    missed: Spans
    extra: Counter[str]
    wrong: list[tuple[int, int, str]]


class Subject:
    """subjects/dirty_oracle.c, running. Use as a context manager."""

    def __init__(self, program: Path, *args: str) -> None:
        self._child = subprocess.Popen([str(program), *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdout
        self.pid = int(self._child.stdout.readline())

    def _ask(self, text: str) -> list[bytes]:
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write(text.encode() + b"\n")
        self._child.stdin.flush()
        lines = []
        while (line := self._child.stdout.readline()) != b".\n":
            assert line, "the subject ended"
            lines.append(line)
        return lines

    def go(self, seed: int, operations: int) -> Truth:
        """Random operations, and the truth about them."""
        truth = Truth()
        must = []
        for line in self._ask(f"go {seed} {operations}"):
            kind, start, *more = line.split()
            if kind == b"M":
                truth.moves = int(start)
                continue
            pages, *rest = more
            first = int(start, 16)
            if kind == b"A":
                truth.arenas.append((first, first + int(pages) * PAGE_SIZE, rest[0].decode(), int(rest[1])))
            else:
                must.append((first, first + int(pages) * PAGE_SIZE))
        truth.must = spans.of(must)
        return truth

    def fill(self, seed: int, threads: int) -> None:
        """Start threads that write all the time."""
        self._ask(f"fill {seed} {threads}")

    def halt(self) -> None:
        """Stop them."""
        self._ask("halt")

    def close(self) -> None:
        self._child.kill()
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Judge:
    """Compares epoch after epoch, inside the arenas (the subject's bookkeeping outside them is dirty too),
    and for what must be listed everywhere."""

    def __init__(self, allowed: tuple[Why, ...]) -> None:
        self._allowed = allowed
        self._populated = spans.EMPTY

    def __call__(self, truth: Truth, epoch: Epoch) -> Verdict:
        missed = spans.minus(truth.must, epoch.spans)
        extra: Counter[str] = Counter()
        wrong: list[tuple[int, int, str]] = []
        renewed = spans.of((a, b) for a, b, _, fresh in truth.arenas if fresh & 1)
        self._populated = spans.minus(self._populated, renewed)
        for why in Why:
            mask = epoch.why == why
            if not mask.any():
                continue
            end = epoch.start[mask] + epoch.count[mask] * np.uint64(PAGE_SIZE)
            needless = spans.minus(spans.joined(epoch.start[mask], end), truth.must)
            for first, last, kind, fresh in truth.arenas:
                arena = spans.of([(first, last)])
                part = spans.common(needless, arena)
                if not part:
                    continue
                # New to the backend: mapped now; or never populated before; or in one vma with an arena that
                # was moved (mremap drops the registration of the whole vma that it merges into), which may
                # have moved on since.
                new = bool(fresh) or not spans.common(self._populated, arena) or (kind == "a" and truth.moves)
                if self._fits(why, kind, bool(new)):
                    extra[why.name] += part.pages
                else:
                    tag = f"{why.name} in {kind}{fresh}"
                    wrong += [(a, (b - a) // PAGE_SIZE, tag) for a, b in part.pairs()]
        held = np.isin(epoch.why, (Why.WRITTEN, Why.HUGE, Why.NEW))
        end = epoch.start[held] + epoch.count[held] * np.uint64(PAGE_SIZE)
        self._populated = spans.common(
            spans.union(self._populated, spans.joined(epoch.start[held], end)),
            spans.of((a, b) for a, b, _, _ in truth.arenas),
        )
        return Verdict(truth.must.pages, missed, extra, wrong)

    def _fits(self, why: Why, kind: str, new: bool) -> bool:
        if why is Why.WRITTEN:
            # A huge page that was split between the write and the look; for soft-dirty, mremap marks every
            # entry that it moves (move_soft_dirty_pte).
            return kind == "h" or (Why.VMA_FLAG in self._allowed and new)
        if why not in self._allowed:
            return False
        match why:
            case Why.NEW:
                return new
            case Why.DISCARDED:  # an untouched page of a huge page had contents too: zeros
                return new or kind == "h"
            case Why.HUGE:  # for soft-dirty also what a write fault mapped of a large folio
                return kind == "h" or (Why.VMA_FLAG in self._allowed and kind in "sg")
            case Why.DROPPED:  # or shared before it was mapped anew
                return kind in "sg" or new
        return True
