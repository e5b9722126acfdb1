"""From a capture on disk to `Facts`.

Only the columns that are used are read, batch by batch, and only memory calls and calls that took faults become
objects.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.capture.merging import rules_of
from pagelens.capture.reader import Capture, plain, read_batches, rows_of, snapshot_of, vma_of
from pagelens.vm.pages import PageRuns
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.vma import Vma
from pagelens.why.facts import I64, CachedRun, Call, Facts, Faults, FrameShot, Task
from pagelens.why.renumber import in_order, with_new_mm
from pagelens.why.replay import CLONE_VM

# Of `Faults`: column of `events`, what a null becomes, type.
_TYPES: dict[str, tuple[str, int, type]] = {
    "seq": ("seq", -1, np.int64),
    "time": ("time_ns", -1, np.int64),
    "latency": ("latency_ns", -1, np.int64),
    "mm": ("mm", -1, np.int32),
    "tid": ("tid", -1, np.int32),
    "addr": ("addr", 0, np.uint64),
    "ip": ("ip", 0, np.uint64),
    "error": ("error_code", -1, np.int32),
    "call": ("in_syscall", -1, np.int16),
    "user": ("user_mode", 0, np.bool_),
    "major": ("major", 0, np.bool_),
    "failed": ("failed", 0, np.bool_),
    "new": ("new_pages", -1, np.int8),
}
_CALL_COLUMNS = [
    "seq",
    "time_ns",
    "latency_ns",
    "mm",
    "pid",
    "tid",
    "name",
    "args",
    "result",
    "gup",
    "detail",
    "file_dev",
    "file_inode",
    "kind",
]
_COLUMNS = list(dict.fromkeys([*(column for column, _, _ in _TYPES.values()), *_CALL_COLUMNS]))

# ns by which the events of two parts overlap at most: the rings of the CPUs are emptied one after the other.
_OVERLAP = 50_000_000


def load(capture: Capture) -> Facts:
    """The facts of a capture. DamagedInputError where a part cannot be read."""
    with lean_arrow():
        return _load(capture)


def _load(capture: Capture) -> Facts:
    faults = _Columns(sum(rows_of(path) for path in capture.parts("events")))
    calls: list[Call] = []
    tasks: list[Task] = []
    ran: list[I64] = []
    dropped_before = None
    for path in capture.parts("events"):
        # Batches small enough to stay in the CPU's cache, and in memory that is at hand already.
        for batch in read_batches(path, _COLUMNS):
            kinds = batch.column("kind")
            names = kinds.dictionary.to_pylist()
            kind = plain(kinds.indices, -1)
            if dropped_before is None:
                dropped_before = _dropped_before(batch, kind, names)
            fault = kind == (names.index("fault") if "fault" in names else -2)
            faults.add(batch, fault)
            if "switch" in names:
                ran.append(_switches_in(batch, kind == names.index("switch")))
            others = [names.index(n) for n in ("syscall", "task") if n in names]
            rows = np.flatnonzero(np.isin(kind, others) & ~fault)
            if len(rows):
                for row in batch.select(_CALL_COLUMNS).take(rows).to_pylist():
                    (tasks if row["kind"] == "task" else calls).append(_record(row))  # type: ignore[arg-type]
    # Frames decide what became of pages that fork shared (`outcome`); they are many, and serve nothing else here.
    forked = any(t.name == "fork" and not int(t.args[2]) & CLONE_VM for t in tasks)
    origins = capture.table("mms", ["mm", "origin", "pid"]).to_pylist()
    older = frozenset(int(r["mm"]) for r in origins if r["origin"] == "start")
    taken = capture.snapshot_rows()
    first, last = _snapshots(capture, taken, frames=forked or bool(older))
    settings = dict(capture.meta.get("settings") or {})
    # Address spaces that were there before us may share pages by forks that nobody recorded.
    known = capture.meta.get("calls") or capture.meta.get("method")  # method: captures of old
    rules = rules_of(str(capture.meta.get("kernel")), settings)
    settings["unmaps_first"], settings["unlocks_all"] = rules.unmaps_first, rules.unlocks_all
    settings["calls"] = known in ("bpf", "ptrace")
    settings["older"] = older
    settings["pids"] = {int(r["mm"]): int(r["pid"]) for r in origins if r["origin"] == "start"}
    settings["parents"] = capture.meta.get("parents") or {}
    onto = np.concatenate(ran) if ran else np.empty((0, 2), np.int64)
    dropped = -1 if dropped_before is None else dropped_before
    shots = _frame_shots(capture) if forked else ()
    cached = _cached(capture, taken)
    facts = Facts(
        faults.done(), tuple(calls), tuple(tasks), first, last, settings, onto, dropped, shots, cached
    )
    return replace(facts, faults=_sorted(with_new_mm(facts)))


def _dropped_before(first: Any, kind: npt.NDArray[np.generic], names: list[str]) -> int:
    # Of the first rows that are left. Numbers begin at 0: where they begin later, parts are gone.
    if first.column("seq")[0].as_py() == 0:
        return -1
    time = first.column("time_ns").to_numpy()
    # A call is dated when it began, which may be long before; all else when it was written.
    dated = np.isin(kind, [i for i, name in enumerate(names) if name != "syscall"])
    return int(time[dated].min() if dated.any() else time.max()) + _OVERLAP


@contextlib.contextmanager
def lean_arrow() -> Iterator[None]:
    """Arrow takes its memory from malloc inside: its own allocator keeps what it freed, a fifth of the peak of a
    million faults, and numpy's columns cannot have it."""
    import pyarrow as pa

    before, ours = pa.default_memory_pool(), pa.system_memory_pool()
    pa.set_memory_pool(ours)
    try:
        yield
    finally:
        pa.set_memory_pool(before)
        before.release_unused()
        ours.release_unused()  # malloc_trim


def _sorted(faults: Faults) -> Faults:
    # By (mm, time, seq), as the replay wants them.
    if in_order(faults):
        return faults
    return faults.take(np.lexsort((faults.seq, faults.time, faults.mm)))


def _switches_in(batch: Any, wanted: npt.NDArray[np.bool_]) -> I64:
    names = batch.column("name")
    words = names.dictionary.to_pylist()
    rows = wanted & (plain(names.indices, -1) == (words.index("in") if "in" in words else -2))
    both = (plain(batch.column("mm"), -1)[rows], plain(batch.column("time_ns"), -1)[rows])
    return np.stack(both, axis=1).astype(np.int64)


class _Columns:
    # `Faults` in the making: of as many rows as there may be, filled from the front. Memory that nobody writes to is
    # none.
    def __init__(self, most: int) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {
            name: np.empty(most, kind) for name, (_, _, kind) in _TYPES.items()
        }
        self._used = 0

    def add(self, batch: Any, rows: npt.NDArray[np.bool_]) -> None:
        """The rows of a batch that are faults. Their arguments and the like are not read."""
        count = int(np.count_nonzero(rows))
        if not count:
            return
        whole = count == len(rows)
        for name, (column, null, _) in _TYPES.items():
            if column not in batch.schema.names:  # a capture of old
                self._arrays[name][self._used : self._used + count] = null
                continue
            values = plain(batch.column(column), null)
            self._arrays[name][self._used : self._used + count] = values if whole else values[rows]
        self._used += count

    def done(self) -> Faults:
        """All of them."""
        return Faults(**{name: array[: self._used] for name, array in self._arrays.items()})


def _record(row: dict[str, Any]) -> Call | Task:
    args = tuple(row["args"] or ())
    if row["kind"] == "task":
        return Task(
            row["seq"],
            row["time_ns"],
            row["mm"],
            row["pid"],
            row["tid"],
            row["name"],
            args,
            row["detail"] or "",
        )
    start = row["time_ns"]
    result = row["result"]
    return Call(
        seq=row["seq"],
        start=start,
        end=start + (row["latency_ns"] or 0),
        mm=row["mm"],
        tid=row["tid"],
        name=row["name"],
        args=args,
        result=-1 if result is None else result,
        gup=row["gup"] or 0,
        detail=row["detail"] or "",
        dev=row["file_dev"] or 0,
        inode=row["file_inode"] or 0,
    )


def _cached(capture: Capture, taken: list[dict[str, Any]]) -> tuple[CachedRun, ...]:
    time = {r["snapshot"]: int(r["time_ns"]) for r in taken}
    rows = capture.table("file_pages", ["snapshot", "dev", "inode", "start", "count"]).to_pylist()
    return tuple(
        CachedRun((r["dev"], r["inode"]), r["start"], r["start"] + r["count"], time[r["snapshot"]])
        for r in rows
    )


def _snapshots(
    capture: Capture, taken: list[dict[str, Any]], *, frames: bool
) -> tuple[dict[int, Snapshot], dict[int, Snapshot]]:
    # Each table is read once and split, not once for each snapshot: there may be hundreds.
    rows = [r for r in taken if r["mm"] is not None]
    vmas: dict[int, list[Vma]] = defaultdict(list)
    columns = ["snapshot", "vma", "start", "end", "perms", "offset", "dev", "inode", "name", "vm_flags"]
    for v in capture.table("vmas", columns).to_pylist():
        vmas[v["snapshot"]].append(vma_of(v))
    pages = _pages(capture, frames)
    first: dict[int, Snapshot] = {}
    last: dict[int, Snapshot] = {}
    for row in rows:
        into = first if row["moment"] in ("exec", "attach", "start") else last
        if into is first and row["mm"] in first:
            continue
        number = row["snapshot"]
        into[row["mm"]] = snapshot_of(row, vmas[number], pages.get(number))
    return first, last


def _pages(capture: Capture, frames: bool) -> dict[int, PageRuns]:
    columns = ["snapshot", "start", "count", "state", *(["pfn"] if frames else [])]
    table = capture.table("pages", columns)
    if not table.num_rows:
        return {}
    number = table.column("snapshot").to_numpy()
    order = np.lexsort((table.column("start").to_numpy(), number))
    if frames:
        table = table.take(order)
        order = np.arange(len(order))
        number = table.column("snapshot").to_numpy()
    number = number[order]
    start, count, state = (table.column(c).to_numpy()[order] for c in ("start", "count", "state"))
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
    return {
        int(number[a]): PageRuns(start[a:b], count[a:b], state[a:b], _frames(table, a, b) if frames else None)
        for a, b in pairwise(edges)
    }


def _frame_shots(capture: Capture) -> tuple[FrameShot, ...]:
    table = capture.table("frames")
    if not table.num_rows:
        return ()
    table = table.sort_by([("time_ns", "ascending"), ("mm", "ascending"), ("start", "ascending")])
    mm, start, until = (table.column(c).to_numpy() for c in ("mm", "time_ns", "until_ns"))
    edges = [0, *(np.flatnonzero((np.diff(start) != 0) | (np.diff(mm) != 0)) + 1).tolist(), len(mm)]
    at, count = table.column("start").to_numpy(), table.column("count").to_numpy()
    return tuple(
        FrameShot(
            int(mm[a]),
            int(start[a]),
            int(until[a]),
            PageRuns(at[a:b], count[a:b], np.zeros(b - a, np.uint32), _frames(table, a, b)),
        )
        for a, b in pairwise(edges)
    )


def _frames(table: Any, first: int, end: int) -> npt.NDArray[np.uint64] | None:
    column = table.column("pfn").slice(first, end - first).combine_chunks()
    if column.null_count:
        return None
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.uint64)
