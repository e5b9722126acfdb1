"""What a dirty-page tracker answers: pages written since the last look, each with its reason.

A page listed without a write behind it ("false dirt") is allowed only for a reason of the closed list `Why`;
a write without its page is allowed only where the backend declares it (`Semantics.misses`). The oracle tests
hold every backend to both.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pagelens.dirty import spans
from pagelens.dirty.spans import U64, Spans
from pagelens.vm.units import PAGE_SHIFT
from pagelens.vm.vma import VmaList


class Why(enum.IntEnum):
    """Why a page is listed. The order is the precedence where several hold."""

    WRITTEN = 1  # a store, or the kernel writing for a system call, since the last look
    HUGE = 2  # one of the pages of a huge page (soft-dirty: or large folio) of which some byte was written
    NEW = 3  # its mapping (or process image) was first seen at this look: everything that it holds
    DISCARDED = 4  # it had contents and reads as zeros, or as the file, now: DONTNEED, remapped, truncated
    DROPPED = 5  # file-backed or shared: its page-table entry went away; whether it was written is not known
    VMA_FLAG = 6  # soft-dirty only: marked with its whole vma (birth, growth, merge, mremap), or by fork
    UNGUARDED = 7  # mprotect only: the program made the range writable itself
    KEPT_HUGE = 8  # --keep-huge: a huge page that is left unarmed; whether it was written is not known
    MOVED = (
        9  # soft-dirty only: the kernel moved it to another frame, and marked it; written or not is not known
    )


@dataclass(frozen=True, slots=True)
class Semantics:
    """What a backend promises. Each text is one clause for people; the tests know the reasons by `extra`."""

    name: str
    scope: str  # "any process" or "this process"
    needs: str
    extra: tuple[Why, ...]  # reasons for which it may list a page that nobody wrote
    too_much: str
    misses: str
    cost: str


@dataclass(frozen=True, slots=True)
class Region:
    """The dirt of one vma. start, end: bytes; pages: its size; dirty_pages: listed at this look."""

    start: int
    end: int
    perms: str
    name: str
    pages: int
    dirty_pages: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """One look. start: uint64[n] addresses, count: uint64[n] pages, why: uint8[n] (`Why`);
    ascending, disjoint.

    epoch counts from 0; time_ns: CLOCK_MONOTONIC at the look; span_ns: since the look before; cost_ns: what
    the look took. unmapped_pages: listed before and no longer mapped (not dirt: there is nothing to save).
    zero_reads: pages that merely read as the zero page since (not dirt). complete: False where pages exist
    that the backend could not watch; notes say which.
    """

    epoch: int
    time_ns: int
    span_ns: int
    cost_ns: int
    backend: str
    start: U64
    count: U64
    why: npt.NDArray[np.uint8]
    vmas: VmaList
    pid: int
    complete: bool = True
    notes: tuple[str, ...] = ()
    unmapped_pages: int = 0
    zero_reads: int = 0
    named: dict[str, tuple[int, int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def dirty_pages(self) -> int:
        """Pages listed."""
        return int(self.count.sum())

    @property
    def spans(self) -> Spans:
        """The listed pages, joined over reasons."""
        return spans.joined(self.start, self.start + (self.count << np.uint64(PAGE_SHIFT)))

    def by_reason(self) -> dict[str, int]:
        """Pages by reason, only those that occur."""
        return {w.name.lower(): n for w in Why if (n := int(self.count[self.why == w].sum()))}

    def ranges(self) -> list[tuple[int, int]]:
        """[(address, pages)], joined over reasons."""
        return [(s, (e - s) >> PAGE_SHIFT) for s, e in self.spans.pairs()]

    def addresses(self) -> U64:
        """uint64[dirty_pages]: the address of each listed page."""
        return spans.pages(Spans(self.start, self.start + (self.count << np.uint64(PAGE_SHIFT))))

    def of(self, name: str) -> list[tuple[int, int]]:
        """[(offset, bytes)] within the named buffer that may have changed. A page at its edge may be listed
        for a neighbour's sake. Raises KeyError for a name that was not given to `track`."""
        start, end = self.named[name]
        part = spans.common(self.spans, spans.of([(start, end)]))
        return [(s - start, e - s) for s, e in part.pairs()]

    def regions(self) -> list[Region]:
        """Dirt by vma, the dirtiest first; vmas without dirt are left out."""
        mapped = Spans(self.vmas.starts, self.vmas.ends)
        part, _, index = spans.overlaps(self.spans, mapped)
        pages = np.bincount(
            index,
            weights=((part.end - part.start) >> np.uint64(PAGE_SHIFT)).astype(float),
            minlength=len(self.vmas),
        ).astype(int)
        out = [
            Region(v.start, v.end, v.perms, v.name, v.pages, int(pages[i]))
            for i, v in ((int(i), self.vmas[int(i)]) for i in np.flatnonzero(pages))
        ]
        return sorted(out, key=lambda r: -r.dirty_pages)


class Builder:
    """Collects spans by reason; what came first keeps its reason."""

    def __init__(self) -> None:
        self._parts: list[tuple[Spans, Why]] = []
        self._seen = spans.EMPTY

    def add(self, what: Spans, why: Why) -> None:
        """List `what` for the reason `why`, as far as it is not listed yet."""
        if not what:
            return
        fresh = spans.minus(what, self._seen)
        if fresh:
            self._parts.append((fresh, why))
            self._seen = spans.union(self._seen, fresh)

    @property
    def seen(self) -> Spans:
        """All that is listed."""
        return self._seen

    def columns(self) -> tuple[U64, U64, npt.NDArray[np.uint8]]:
        """(start, count, why), ascending."""
        if not self._parts:
            return np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint8)
        shift = np.uint64(PAGE_SHIFT)
        if len(self._parts) == 1:
            only, reason = self._parts[0]
            return only.start, (only.end - only.start) >> shift, np.full(len(only.start), reason, np.uint8)
        start = np.concatenate([p.start for p, _ in self._parts])
        end = np.concatenate([p.end for p, _ in self._parts])
        why = np.concatenate([np.full(len(p.start), w, np.uint8) for p, w in self._parts])
        order = np.argsort(start, kind="stable")
        return start[order], (end[order] - start[order]) >> shift, why[order]


@dataclass(slots=True)
class Look:
    """A backend's raw answer; the tracker adds number and time to make an `Epoch`."""

    builder: Builder
    vmas: VmaList
    complete: bool = True
    notes: list[str] = field(default_factory=list)
    unmapped_pages: int = 0
    zero_reads: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """One way to find written pages. `arm` forgets everything so far; each `look` answers for the time since
    the last one and starts the next epoch in the same step."""

    semantics: Semantics

    def arm(self) -> None:
        """Start watching."""
        ...

    def look(self) -> Look:
        """What was written since; begins the next epoch."""
        ...

    def close(self) -> None:
        """Stop watching and leave nothing behind. Twice is harmless."""
        ...


def each(epoch: Epoch) -> Iterator[tuple[int, int, Why]]:
    """(address, pages, reason) of each run."""
    for s, c, w in zip(epoch.start.tolist(), epoch.count.tolist(), epoch.why.tolist(), strict=True):
        yield s, c, Why(w)
