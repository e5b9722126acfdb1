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
    and for what must be listed everywhere. By columns: an epoch is judged ten times as fast as by arena and
    reason, which an emulated guest needs."""

    def __init__(self, allowed: tuple[Why, ...]) -> None:
        self._allowed = allowed
        self._populated = spans.EMPTY
        self._migrated = _migrated()
        self._has_moved = False

    def __call__(self, truth: Truth, epoch: Epoch) -> Verdict:
        arenas = sorted(truth.arenas)
        first = np.array([a for a, _, _, _ in arenas], np.uint64)
        last = np.array([b for _, b, _, _ in arenas], np.uint64)
        kind = np.array([ord(k) for _, _, k, _ in arenas], np.int64)
        fresh = np.array([f for _, _, _, f in arenas], np.int64)
        renewed = (fresh & 1) != 0
        self._populated = spans.minus(self._populated, Spans(first[renewed], last[renewed]))
        held = np.bincount(spans.overlaps(self._populated, Spans(first, last))[2], minlength=len(first)) > 0
        # New to the backend: mapped now; or never populated before; or in one vma with an arena that was moved
        # (mremap drops the registration of the whole vma that it merges into), which may have moved on since.
        new = (fresh != 0) | ~held | ((kind == ord("a")) & (truth.moves > 0))
        if Why.MOVED in self._allowed:
            migrated = _migrated()
            self._has_moved, self._migrated = migrated != self._migrated, migrated

        page = epoch.addresses()
        why = epoch.why.repeat(epoch.count.astype(np.int64)).astype(np.int64)
        arena, inside = _place(page, first, last)
        content = inside & ((why == Why.WRITTEN) | (why == Why.HUGE) | (why == Why.NEW))
        self._populated = spans.common(
            spans.union(self._populated, _joined(page[content])), Spans(first, last)
        )
        needless = np.flatnonzero(inside & ~_place(page, *truth.must)[1])
        row = arena[needless]
        sort = (why[needless] << 9) | (kind[row] << 1) | new[row]
        extra: Counter[str] = Counter()
        wrong: list[tuple[int, int, str]] = []
        for key in np.flatnonzero(np.bincount(sort)).tolist():
            mine = sort == key
            reason, letter = Why(key >> 9), chr((key >> 1) & 0xFF)
            alone = not (np.diff(page[needless[mine]]) == PAGE_SIZE).any()
            if self._fits(reason, letter, bool(key & 1), alone):
                extra[reason.name] += int(mine.sum())
                continue
            for index in np.flatnonzero(np.bincount(row[mine])).tolist():
                tag = f"{reason.name} in {letter}{int(fresh[index])}"
                part = _joined(page[needless[mine & (row == index)]])
                wrong += [(a, (b - a) // PAGE_SIZE, tag) for a, b in part.pairs()]
        return Verdict(truth.must.pages, spans.minus(truth.must, epoch.spans), extra, wrong)

    def _fits(self, why: Why, kind: str, new: bool, alone: bool) -> bool:
        if why is Why.WRITTEN:
            # A huge page that was split between the write and the look; for soft-dirty, mremap marks every
            # entry that it moves (move_soft_dirty_pte), and of one page alone that cannot be told.
            return kind == "h" or (Why.MOVED in self._allowed and new and alone)
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
            case Why.MOVED:  # only where the kernel did move pages since the look before, or mremap did; or a
                # huge page came into frames that were another one's, and was split since
                return self._has_moved or new or kind == "h"
        return True


def _place(page: spans.U64, first: spans.U64, last: spans.U64) -> tuple[np.ndarray, np.ndarray]:
    # (index of the span that holds each page, or any; whether one does). Spans ascending and disjoint.
    if not len(first):
        return np.zeros(len(page), np.int64), np.zeros(len(page), bool)
    index = np.maximum(np.searchsorted(first, page, side="right") - 1, 0)
    return index, (page >= first[index]) & (page < last[index])


def _joined(page: spans.U64) -> Spans:
    return spans.joined(page, page + np.uint64(PAGE_SIZE))


def _migrated() -> int:
    # Pages that this machine's kernel has moved to other frames so far.
    text = Path("/proc/vmstat").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("pgmigrate_success "))
