"""Snapshot: one address space at one time, from the kernel or from the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagelens.vm.accounting import Accounting
from pagelens.vm.pages import PageRuns
from pagelens.vm.vma import VmaList


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One address space.

    pid: process id (0 in the model if it has none). time_ns: CLOCK_MONOTONIC when reading began.
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
