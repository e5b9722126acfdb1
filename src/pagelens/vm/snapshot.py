"""Snapshot: one address space at one time, from the kernel or from the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagelens.vm.accounting import Accounting
from pagelens.vm.pages import PageRuns
from pagelens.vm.vma import VmaList


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One address space.

    pid: process id (0 in the model if it has none). time_ns: CLOCK_MONOTONIC when reading began,
    until_ns when it ended (-1: not known).
    pages, accounting: None when not asked for. method: how it was read ("proc maps+pagemap, target stopped",
    "model linux-6.12"). complete: False when something could not be read or the target ran meanwhile, then
    `notes` says what.
    """

    pid: int
    time_ns: int
    vmas: VmaList
    pages: PageRuns | None = None
    accounting: Accounting | None = None
    method: str = ""
    complete: bool = True
    notes: tuple[str, ...] = field(default_factory=tuple)
    until_ns: int = -1

    @property
    def known_ns(self) -> int:
        """ns at which all of its pages had been seen: where the target ran meanwhile, a page may have come
        while it was read."""
        return self.time_ns if self.complete else max(self.time_ns, self.until_ns)
