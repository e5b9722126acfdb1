"""The end of a recording: what was lost and where, and the completeness equation in sum.

Kept apart from the recorder so that every way of recording (BPF, perf) is judged by the same lines.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagelens.capture.summary import METHOD_BPF, build

METHOD_COUNTERS = (
    "counters of each task and snapshots; neither BPF nor perf is allowed here: no fault is seen by itself"
)
METHOD_WAIT = (
    "counters of the program and of what it waited for (wait4); neither BPF nor perf is allowed here, and nothing stops"
    " to read those of others: no fault is seen by itself"
)
METHOD_PERF = "perf events inherited by the tree, counters at exit stops"
METHOD_PERF_ALONE = (
    "perf events inherited by the tree; nothing stops at its end, so its counters are not read"
)


@dataclass(frozen=True, slots=True)
class Ended:
    """Figures at the end. totals: of the recording (`totals()`); drained, dropped_faults, dropped_others,
    damaged: of the drain; written: faults in the capture; dropped_rows, dropped_written: events, and faults of
    `written`, that --max-size took out again; alive: tasks that ran on; error: errno that
    stopped the writing, or 0. calls: told by a tracer, with the gup faults of each.
    stops: of each task at its end, where its counters are read. events: of faults; False where they are only
    counted."""

    totals: Mapping[str, int]
    drained: int
    dropped_faults: int
    dropped_others: int
    damaged: int
    written: int
    dropped_rows: int
    dropped_written: int
    alive: int
    snapshot_losses: int
    error: int
    lean: bool
    perf: bool
    kernel_visible: bool
    calls: bool = False
    stops: bool = True
    events: bool = True


def losses(e: Ended) -> list[tuple[str, int, str]]:
    """Rows of `losses`: (what, count, meaning); only those with a count."""
    get = e.totals.get
    rows = [
        ("ring", get("lost", 0), "faults that found the ring full (--ring-size)"),
        ("ring", get("lost_records", 0), "other records that found the ring full (--ring-size)"),
        ("missed", get("missed", 0), "faults whose event the kernel did not deliver"),
        ("disk", e.dropped_faults + e.dropped_others, "records after the disk was full"),
        (
            "max-size",
            e.dropped_rows,
            f"older events dropped by --max-size, {e.dropped_written:,} faults among them;"
            " causes that rest on them stay open",
        ),
        ("snapshot", e.snapshot_losses, "snapshots that could not be taken"),
        ("task", get("tasks_untracked", 0), "tasks that could not be marked: not recorded"),
        ("task", get("tasks_uncounted", 0), "tasks whose counters could not be read: not in the sum"),
        ("task", e.alive, "tasks that ran on when the recording ended: their counters are not in the sum"),
        (
            "skipped",
            get("skipped_tasks", 0),
            "starts and execs of tasks, of the whole machine, that the kernel did not show us;"
            " a start of ours was seen when the task ran first, an exec was not",
        ),
        (
            "skipped",
            get("skipped_events", 0),
            "calls and entries of faults, of the whole machine, that the kernel did not show us;"
            " how many of them are ours is not known",
        ),
        ("spool", e.damaged, "records that made no sense"),
    ]
    return [row for row in rows if row[1]]


def balance(e: Ended) -> dict[str, Any]:
    """The summary object."""
    get = e.totals.get
    lost = get("lost", 0) + get("missed", 0) + e.dropped_faults
    if e.error:
        lost += max(0, e.drained - e.written)  # what the drain took but the disk refused
    status = None
    if e.error:
        status = "disk full" if e.error == errno.ENOSPC else f"stopped: {os.strerror(e.error)}"
    elif e.alive or get("tasks_uncounted", 0) or e.dropped_rows:
        status = "partial"
    unseen = 0
    if e.perf:
        counted = get("min_flt", 0) + get("maj_flt", 0)
        seen = e.written - get("recorded_uncounted", 0) + get("gup", 0)
        unseen = max(0, counted - lost - seen)
        status = status or ("partial" if unseen else None)
    return build(
        counted_minor=get("min_flt", 0),
        counted_major=get("maj_flt", 0),
        recorded=e.written,
        gup=get("gup", 0),
        failed=None if e.lean or e.perf else get("failed", 0),
        lost=lost,
        kernel_mode_unseen=unseen,
        uncounted=get("recorded_uncounted", 0),
        status=status,
        method=_perf_method(e) if e.perf else METHOD_BPF,
    )


def _perf_method(e: Ended) -> str:
    if not e.events and not e.stops:
        return METHOD_WAIT
    if not e.events:
        return METHOD_COUNTERS + ("; calls by ptrace" if e.calls else "")
    if e.calls:
        blind = "" if e.kernel_visible else "; faults in kernel mode unseen"
        return f"{METHOD_PERF}; calls by ptrace{blind}"
    method = METHOD_PERF if e.stops else METHOD_PERF_ALONE
    blind = "gup faults unseen" if e.kernel_visible else "faults in kernel mode and gup unseen"
    return f"{method}; {blind}; of the calls only what they mapped (MMAP2), not munmap or madvise"
