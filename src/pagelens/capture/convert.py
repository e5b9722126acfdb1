"""Spool segment to Arrow tables: columns in, columns out, no Python per fault.

Rows of a segment are put in order of time. Segments overlap by a few milliseconds (the CPUs' rings are
emptied one after the other) and a call is written when it returns but dated when it began: who needs total
order sorts by (time_ns, seq). Rejected: holding rows back until order is certain (a killed recorder would
lose or double them).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.capture import records
from pagelens.capture.directory import SUFFIXES
from pagelens.capture.records import Flag, Kind
from pagelens.capture.tables import schema
from pagelens.vm.names import SYSCALL_ARGS, SYSCALLS
from pagelens.vm.units import ranges_text

Rows = npt.NDArray[Any]

_ENDINGS = tuple(number for number, name in SYSCALLS.items() if name in ("exit", "exit_group"))


@dataclass
class Converted:
    """What one segment becomes."""

    tables: dict[str, Any] = field(default_factory=dict)  # name -> pyarrow.Table
    rows: int = 0
    recorded: int = 0  # completed faults
    truncated: int = 0  # bytes at the ends of files that make no whole row


def segment_files(spool: Path, segment: int) -> dict[str, Path]:
    """The files of a segment, by suffix."""
    return {suffix: spool / f"{segment:08d}.{suffix}" for suffix in SUFFIXES}


def convert(spool: Path, segment: int, first_seq: int) -> Converted:
    """Tables `events`, `stacks`, `mms`, `tasks` of a segment; empty ones are left out."""
    import pyarrow as pa

    out = Converted()
    files = segment_files(spool, segment)
    faults = _rows(files["faults"], records.FAULT, out)
    calls = _rows(files["calls"], records.CALL, out)
    switches = _rows(files["switches"], records.FAULT, out)
    text = files["text"].read_bytes() if files["text"].exists() else b""
    out.recorded = int(np.count_nonzero((faults["flags"] & Flag.FAILED) == 0))
    out.rows = len(faults) + len(calls) + len(switches)
    stacks = _stacks(files["stacks"])
    if stacks is not None:
        out.tables["stacks"] = stacks
    raw = _rows(files["raw"], records.RAW, out)
    if len(raw):
        out.tables["raw_stacks"] = _raw_stacks(raw)
    if not out.rows:
        return out
    details: list[str | None] = [_text(text, row) if text else None for row in calls]
    out.tables["events"] = _events(faults, calls, switches, details, first_seq)
    for name, rows in (("mms", _mms(calls, details)), ("tasks", _tasks(calls))):
        if rows:
            out.tables[name] = pa.Table.from_pylist(rows, schema=schema(name))
    return out


def _rows(path: Path, dtype: np.dtype[Any], out: Converted) -> Rows:
    if not path.exists():
        return np.empty(0, dtype)
    size = path.stat().st_size
    out.truncated += size % dtype.itemsize
    return np.fromfile(path, dtype, count=size // dtype.itemsize)


def _text(text: bytes, row: Any) -> str | None:
    if not row["ntext"]:
        return None
    begin = int(row["text_offset"])
    own = text[begin : begin + int(row["ntext"])]
    if row["kind"] == Kind.SYSCALL and int(row["flags"]) & Flag.VECTORS:
        return ranges_text(np.frombuffer(own, "u8").tolist())
    return own.split(b"\0", 1)[0].decode(errors="replace")


def _stacks(path: Path) -> Any:
    import pyarrow as pa

    if not path.exists() or path.stat().st_size < 16:
        return None
    words = np.fromfile(path, "u8")
    ids, offsets, values = [], [0], []
    at = 0
    while at + 2 <= len(words):
        count = int(words[at + 1])
        if at + 2 + count > len(words):
            break
        ids.append(int(words[at]))
        values.append(words[at + 2 : at + 2 + count])
        offsets.append(offsets[-1] + count)
        at += 2 + count
    if not ids:
        return None
    frames = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(values)))
    by_frame_pointers = pa.nulls(len(ids), pa.bool_())
    return pa.table([pa.array(ids, pa.int64()), frames, by_frame_pointers], schema=schema("stacks"))


def _raw_stacks(raw: Rows) -> Any:
    import pyarrow as pa

    return pa.table(
        [
            pa.array(raw["stack_id"]),
            pa.array(raw["mm"].astype("i4")),
            pa.array(raw["pid"].astype("i4")),
            pa.FixedSizeListArray.from_arrays(pa.array(raw["regs"].ravel()), 17).cast(pa.list_(pa.uint64())),
            pa.array([bytes(s[:n]) for s, n in zip(raw["stack"], raw["length"], strict=True)], pa.binary()),
        ],
        schema=schema("raw_stacks"),
    )


def _events(faults: Rows, calls: Rows, switches: Rows, details: list[str | None], first_seq: int) -> Any:
    import pyarrow as pa

    parts = (faults, calls, switches)
    n_fault, n_call = len(faults), len(calls)
    total = n_fault + n_call + len(switches)

    def joined(name: str) -> Rows:
        return np.concatenate([p[name] for p in parts])

    time = joined("time_ns")
    order = np.argsort(time, kind="stable")
    is_fault = np.zeros(total, bool)
    is_fault[:n_fault] = True
    is_call = np.zeros(total, bool)
    is_call[n_fault : n_fault + n_call] = True
    kind, flags = joined("kind"), joined("flags")
    is_syscall = kind == Kind.SYSCALL
    is_exit = kind == Kind.EXIT

    def column(values: Rows, null: Rows | None, kind_: Any) -> Any:
        values = values[order]
        if null is None:
            return pa.array(values).cast(kind_) if kind_ is not None else pa.array(values)
        array = pa.array(values, mask=null[order])
        return array.cast(kind_) if array.type != kind_ else array

    def scattered(name: str, dtype: str) -> Rows:
        wide = np.zeros(total, dtype)
        wide[is_call] = calls[name]
        return wide

    addr = np.zeros(total, "u8")
    addr[:n_fault] = faults["addr"]
    nr, ip, stack, latency = joined("nr"), joined("ip"), joined("stack_id"), joined("latency_ns")
    extra = joined("extra")
    failed = (flags & Flag.FAILED) != 0
    is_file = is_call & ((flags & Flag.FILE) != 0)
    data = {
        "seq": pa.array(np.arange(first_seq, first_seq + total, dtype=np.int64)),
        "time_ns": column(time, None, None),
        "mm": column(joined("mm").astype("i4"), joined("mm") == records.NO_MM, pa.int32()),
        "pid": column(joined("pid").astype("i4"), None, None),
        "tid": column(joined("tid").astype("i4"), None, None),
        "cpu": column(joined("cpu").astype("i2"), None, None),
        "kind": _kinds(kind[order]),
        "name": _names(kind, nr, flags, scattered("result", "i8"), order),
        "addr": column(addr, ~is_fault, pa.uint64()),
        "ip": column(ip, ip == 0, pa.uint64()),
        "user_mode": column((flags & Flag.USER) != 0, ~is_fault, pa.bool_()),
        "error_code": column(extra.astype("i4"), ~is_fault | ((flags & Flag.ERROR) == 0), pa.int32()),
        "major": column((flags & Flag.MAJOR) != 0, ~is_fault | failed, pa.bool_()),
        "failed": column(failed, ~is_fault, pa.bool_()),
        "latency_ns": column(latency, (flags & Flag.LATENCY) == 0, pa.int64()),
        "new_pages": column(
            ((flags & Flag.NEW_PAGE) != 0).astype("i1"),
            ~is_fault | failed | ((flags & Flag.WATCHED) == 0),
            pa.int8(),
        ),
        "in_syscall": column(nr, (nr < 0) | is_syscall, pa.int16()),
        "args": _args(calls, kind, n_fault, order),
        "result": column(
            scattered("result", "i8"),
            ~(is_syscall | is_exit) | (is_syscall & np.isin(nr, _ENDINGS)),
            pa.int64(),
        ),
        "gup": column(extra.astype("i8"), ~(is_syscall | is_exit), pa.int64()),
        "detail": _details(details, n_fault, total, order),
        "file_dev": column(_user_dev(scattered("dev", "u8")), ~is_file, pa.uint64()),
        "file_inode": column(scattered("ino", "u8"), ~is_file, pa.uint64()),
        "stack_id": column(stack, stack < 0, pa.int64()),
    }
    return pa.table([data[f.name] for f in schema("events")], schema=schema("events"))


def _user_dev(dev: Rows) -> Rows:
    # The kernel's dev_t is major << 20 | minor; stat(2) gives what makedev() makes.
    major, minor = dev >> np.uint64(20), dev & np.uint64(0xFFFFF)
    low = (minor & np.uint64(0xFF)) | ((major & np.uint64(0xFFF)) << np.uint64(8))
    high = ((minor & ~np.uint64(0xFF)) << np.uint64(12)) | ((major & ~np.uint64(0xFFF)) << np.uint64(32))
    return low | high


def _kinds(kind: Rows) -> Any:
    import pyarrow as pa

    names = ["fault", "syscall", "task", "switch", "daemon"]
    table = np.zeros(16, "i4")
    for number, name in records.EVENT_KIND.items():
        table[number] = names.index(name)
    return pa.DictionaryArray.from_arrays(pa.array(table[kind]), pa.array(names))


def _names(kind: Rows, nr: Rows, flags: Rows, result: Rows, order: Rows) -> Any:
    # One dictionary of all names that occur; faults have none.
    import pyarrow as pa

    key = np.zeros(len(kind), "i8")  # 0: no name
    syscall = kind == Kind.SYSCALL
    key[syscall] = 1000 + nr[syscall].astype("i8")
    compat = syscall & ((flags & Flag.COMPAT) != 0)
    key[compat] = 100_000 + nr[compat].astype("i8")
    for task in records.TASK_NAME:
        key[kind == task] = 10 + int(task)
    switch = kind == Kind.SWITCH
    key[switch] = np.where((flags[switch] & Flag.OUT) != 0, 1, 2)
    daemon = kind == Kind.DAEMON
    key[daemon] = 100 + result[daemon]
    distinct, index = np.unique(key[order], return_inverse=True)
    return pa.DictionaryArray.from_arrays(
        pa.array(index.astype("i4"), mask=key[order] == 0), pa.array([_name(int(k)) for k in distinct])
    )


def _name(key: int) -> str:
    if key >= 100_000:
        return f"ia32:{key - 100_000}"
    if key >= 1000:
        return SYSCALLS.get(key - 1000, f"syscall_{key - 1000}")
    if key >= 100:
        return records.DAEMONS.get(key - 100, f"daemon_{key - 100}")
    if key >= 10:
        return records.TASK_NAME[Kind(key - 10)]
    return ("", "out", "in")[key]


@functools.cache
def _arity() -> Rows:
    counts = np.full(1024, 6, "i4")
    for number, name in SYSCALLS.items():
        if name in SYSCALL_ARGS and number < len(counts):
            counts[number] = len(SYSCALL_ARGS[name])
    return counts


def _args(calls: Rows, kind: Rows, n_fault: int, order: Rows) -> Any:
    import pyarrow as pa

    table = np.zeros(16, "i4")
    for number, count in records.ARGUMENTS.items():
        table[number] = count
    by_row = table[kind]
    # A system call has as many arguments as it takes; the other registers mean nothing.
    syscall = np.flatnonzero(kind == Kind.SYSCALL)
    by_row[syscall] = _arity()[np.clip(calls["nr"][syscall - n_fault], 0, 1023)]
    # But a userfaultfd ioctl's structure follows its three (call_exit, native/bpf/calls.h), and the address three of a
    # write or writev to /proc/PID/mem.
    rows = calls[syscall - n_fault]
    by_row[syscall[np.isin(rows["nr"], (1, 20)) & ((rows["flags"] & Flag.FILE) != 0)]] = 4
    by_row[syscall[(rows["nr"] == 16) & ((rows["args"][:, 1] >> np.uint64(8)) & np.uint64(0xFF) == 0xAA)]] = 6
    lengths = by_row[order]
    offsets = np.zeros(len(order) + 1, "i4")
    np.cumsum(lengths, out=offsets[1:])
    in_order = order[lengths > 0] - n_fault
    args = calls["args"][in_order]
    keep = np.arange(6) < lengths[lengths > 0][:, None]
    null = np.concatenate((lengths == 0, [False]))
    return pa.ListArray.from_arrays(pa.array(offsets, mask=null), pa.array(args[keep]))


def _details(details: list[str | None], n_fault: int, total: int, order: Rows) -> Any:
    import pyarrow as pa

    names = sorted({d for d in details if d is not None})
    where = {name: i for i, name in enumerate(names)}
    index = np.full(total, -1, "i4")
    index[n_fault : n_fault + len(details)] = [-1 if d is None else where[d] for d in details]
    index = index[order]
    return pa.DictionaryArray.from_arrays(pa.array(index, mask=index < 0), pa.array(names, pa.string()))


def _mms(calls: Rows, details: list[str | None]) -> list[dict[str, Any]]:
    rows = []
    for i in np.flatnonzero(np.isin(calls["kind"], (Kind.FORK, Kind.EXEC, Kind.START))).tolist():
        row = calls[i]
        args = row["args"].tolist()
        base = {"time_ns": int(row["time_ns"]), "pid": int(row["pid"]), "parent_mm": int(row["mm"])}
        if row["kind"] == Kind.EXEC:
            rows.append(base | {"mm": args[1], "origin": "exec", "parent_mm": args[0], "path": details[i]})
        elif row["kind"] == Kind.START:
            if args[0] != args[1]:
                continue  # threads share their leader's row
            rows.append(base | {"mm": args[3], "origin": "start", "parent_mm": None, "path": details[i]})
        elif args[3] != row["mm"]:
            rows.append(base | {"mm": args[3], "origin": "fork", "pid": args[0]})
    return rows


def task_row(row: Any, *, alive: bool = False) -> dict[str, Any]:
    """A row of `tasks` from an EXIT record (one element of a CALL array)."""
    min_flt, maj_flt, recorded, gup, lost, failed = row["args"].tolist()
    lost += int(row["dev"])  # events that never reached our program
    return {
        "pid": int(row["pid"]),
        "tid": int(row["tid"]),
        "mm": int(row["mm"]),
        "end_ns": None if alive else int(row["time_ns"]),
        "exit_code": None if alive else int(row["result"]),
        "min_flt": min_flt,
        "maj_flt": maj_flt,
        "recorded": recorded,
        "gup": gup,
        "lost": lost,
        "failed": failed,
        "nofault": int(row["ino"]),
        "unexplained": min_flt + maj_flt - recorded - gup - lost,
    }


def _tasks(calls: Rows) -> list[dict[str, Any]]:
    return [task_row(row) for row in calls[calls["kind"] == Kind.EXIT]]


def remove_segment(spool: Path, segment: int) -> None:
    """Delete a segment's files."""
    for path in segment_files(spool, segment).values():
        path.unlink(missing_ok=True)
