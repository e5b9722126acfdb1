"""The questions of the case studies, each run live here, and each with its answer and evidence.

A case starts its own small program (C sources in subjects/), looks at it, and says what it saw, by which
method. What this kernel or this privilege cannot show comes from the model, and says so; what neither can
show is named.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from pagelens.report.cases.lab import Answer, Lab


@dataclass(frozen=True, slots=True)
class Entry:
    """number: as in docs/cases. seconds: what it takes, roughly."""

    number: int
    question: str
    module: str
    seconds: float


ENTRIES: tuple[Entry, ...] = (
    Entry(1, "Does creating a thread dirty 100 MB?", "thread_dirty", 2),
    Entry(2, "How did the kernel know that I wrote?", "who_wrote", 3),
    Entry(3, "Present, yet kpagecount is 0?", "count_zero", 1),
    Entry(4, "Can I save a process, and put it back?", "save_and_roll_back", 3),
    Entry(6, "Keep the range, drop the data?", "drop_data", 2),
    Entry(7, "Which pages does a program write?", "every_write", 3),
    Entry(10, "The paging lab: what happens, and what does it cost?", "paging_lab", 3),
    Entry(11, "Who copied the parent?", "workers", 10),
)


def run(entry: Entry, lab: Lab) -> Answer:
    """Answer one question."""
    module = importlib.import_module(f"pagelens.report.cases.{entry.module}")
    answer: Answer = module.run(lab)
    return answer


__all__ = ["ENTRIES", "Answer", "Entry", "Lab", "run"]
