"""From a capture on disk to `Facts`.

Only the columns that are used are read, and only memory calls and calls that took faults become objects.
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

from pagelens.capture.reader import Capture, read_part
from pagelens.vm.pages import PageRuns
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.vma import Vma, VmaList
from pagelens.why.facts import I64, Call, Facts, Faults, Task
from pagelens.why.replay import in_order, with_new_mm

_FAULT_COLUMNS = [
    "seq",
    "time_ns",
    "latency_ns",
    "mm",
    "tid",
    "addr",
    "ip",
    "error_code",
    "in_syscall",
    "user_mode",
    "major",
    "failed",
]
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
]


def load(capture: Capture) -> Facts:
    """The facts of a capture. DamagedInputError where a part cannot be read."""
    with lean_arrow():
        return _load(capture)


def _load(capture: Capture) -> Facts:
    faults: list[dict[str, Any]] = []
    calls: list[Call] = []
    tasks: list[Task] = []
    ran: list[I64] = []
    for path in capture.parts("events"):
        # Faults are most rows and need few columns; what the rest needs (arguments, names) is read for it
        # alone.
        table = read_part(path, [*_FAULT_COLUMNS, "kind"])
        kinds = table.column("kind").combine_chunks()
        names = kinds.dictionary.to_pylist()
        kind = kinds.indices.to_numpy(zero_copy_only=False)
        fault = np.flatnonzero(kind == names.index("fault")) if "fault" in names else np.empty(0, int)
        if len(fault):
            chosen = table.select(_FAULT_COLUMNS)
            faults.append(_faults(chosen if len(fault) == table.num_rows else chosen.take(fault)))
            del chosen
        del table, kinds
        others = [names.index(n) for n in ("syscall", "task", "switch") if n in names]
        rows = np.flatnonzero(np.isin(kind, others))
        if not len(rows):
            continue
        table = read_part(path, [*_CALL_COLUMNS, "kind"]).take(rows)
        kind_of = np.array(table.column("kind").to_pylist(), object)
        onto = kind_of == "switch"
        if onto.any():
            ran.append(_switches_in(table.select(["name", "mm", "time_ns"]), onto))
        for row in table.take(np.flatnonzero(~onto)).to_pylist():
            (tasks if row["kind"] == "task" else calls).append(_record(row))  # type: ignore[arg-type]
        del table
    columns = _joined(faults)
    first, last = _snapshots(capture)
    settings = dict(capture.meta.get("settings") or {})
    # Address spaces that were there before us may share pages by forks that nobody recorded.
    origins = capture.table("mms", ["mm", "origin"]).to_pylist()
    known = capture.meta.get("calls") or capture.meta.get("method")  # method: captures of old
    settings["calls"] = known in ("bpf", "ptrace")
    settings["older"] = frozenset(int(r["mm"]) for r in origins if r["origin"] == "start")
    onto = np.concatenate(ran) if ran else np.empty((0, 2), np.int64)
    facts = Facts(columns, tuple(calls), tuple(tasks), first, last, settings, onto)
    return replace(facts, faults=_sorted(with_new_mm(facts)))


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


def _switches_in(table: Any, wanted: npt.NDArray[np.bool_]) -> I64:
    name = np.array(table.column("name").to_pylist(), object)
    rows = np.flatnonzero(wanted & (name == "in"))
    both = (_column(table, "mm", -1)[rows], _column(table, "time_ns", -1)[rows])
    return np.stack(both, axis=1)


def _column(table: Any, name: str, null: int) -> I64:
    import pyarrow.compute as pc

    column = table.column(name)
    if column.null_count:
        column = pc.fill_null(column, null)
    return np.asarray(column.to_numpy().astype(np.int64))


def _faults(table: Any) -> dict[str, Any]:
    # args and the like are not read for faults: null lists cost memory too.
    import pyarrow.compute as pc

    def flag(name: str) -> Any:
        return pc.fill_null(table.column(name), False).to_numpy().astype(bool)

    return {
        "seq": _column(table, "seq", -1),
        "time": _column(table, "time_ns", -1),
        "latency": _column(table, "latency_ns", -1),
        "mm": _column(table, "mm", -1).astype(np.int32),
        "tid": _column(table, "tid", -1).astype(np.int32),
        "addr": table.column("addr").to_numpy().astype(np.uint64),
        "ip": _column(table, "ip", 0).astype(np.uint64),
        "error": _column(table, "error_code", -1).astype(np.int32),
        "call": _column(table, "in_syscall", -1).astype(np.int16),
        "user": flag("user_mode"),
        "major": flag("major"),
        "failed": flag("failed"),
    }


def _joined(parts: list[dict[str, Any]]) -> Faults:
    kinds = {"addr": np.uint64, "ip": np.uint64, "user": bool, "major": bool, "failed": bool}
    columns = {}
    for name in Faults.__dataclass_fields__:
        pieces = [part.pop(name) for part in parts]  # given back as soon as they are joined
        columns[name] = np.concatenate(pieces) if pieces else np.empty(0, kinds.get(name, np.int64))
    return Faults(**columns)


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


def _snapshots(capture: Capture) -> tuple[dict[int, Snapshot], dict[int, Snapshot]]:
    # Each table is read once and split, not once for each snapshot: there may be hundreds.
    rows = [r for r in capture.snapshot_rows() if r["mm"] is not None]
    vmas: dict[int, list[Vma]] = defaultdict(list)
    columns = ["snapshot", "vma", "start", "end", "perms", "offset", "dev", "inode", "name", "vm_flags"]
    for v in capture.table("vmas", columns).to_pylist():
        prot, shared = Vma.parse_perms(v["perms"])
        flags = None if v["vm_flags"] is None else frozenset(v["vm_flags"].split())
        vmas[v["snapshot"]].append(
            Vma(v["start"], v["end"], prot, shared, v["offset"], v["dev"], v["inode"], v["name"], flags)
        )
    pages = _pages(capture)
    first: dict[int, Snapshot] = {}
    last: dict[int, Snapshot] = {}
    for row in rows:
        into = first if row["moment"] in ("exec", "attach", "start") else last
        if into is first and row["mm"] in first:
            continue
        number = row["snapshot"]
        into[row["mm"]] = Snapshot(
            row["pid"],
            row["time_ns"],
            VmaList(vmas[number]),
            pages.get(number),
            method=row["method"],
            complete=row["complete"],
        )
    return first, last


def _pages(capture: Capture) -> dict[int, PageRuns]:
    table = capture.table("pages", ["snapshot", "start", "count", "state"])
    if not table.num_rows:
        return {}
    number = table.column("snapshot").to_numpy()
    order = np.lexsort((table.column("start").to_numpy(), number))
    number = number[order]
    start, count, state = (table.column(c).to_numpy()[order] for c in ("start", "count", "state"))
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
    return {int(number[a]): PageRuns(start[a:b], count[a:b], state[a:b]) for a, b in pairwise(edges)}
