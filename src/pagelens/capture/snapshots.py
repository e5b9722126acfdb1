"""Snapshots into rows of the capture's tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagelens.capture.tables import schema
from pagelens.linux.residency import UNKNOWN_ORDER, FilePages
from pagelens.vm.accounting import SMAPS_FIELDS
from pagelens.vm.pages import PageRuns
from pagelens.vm.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Shot:
    """A snapshot that waits to be written: its number, address space, moment, and what the page cache held of
    the files that it maps."""

    number: int
    mm: int | None
    moment: str
    snap: Snapshot
    files: tuple[FilePages, ...] = ()


@dataclass(frozen=True, slots=True)
class FrameShot:
    """The frames of an address space at a fork, which waits to be written. time_ns, until_ns: of its reading."""

    number: int
    mm: int
    time_ns: int
    until_ns: int
    runs: PageRuns


def to_tables(shots: Sequence[Shot | FrameShot]) -> dict[str, Any]:
    """pyarrow tables `snapshots`, `vmas`, `pages`, `accounting`, `file_pages`, `frames`; empty ones left out."""
    import pyarrow as pa

    parts: dict[str, list[Any]] = {}
    for shot in shots:
        tables = {"frames": _frames(shot)} if isinstance(shot, FrameShot) else _one(shot)
        for name, rows in tables.items():
            parts.setdefault(name, []).append(rows)
    return {name: pa.concat_tables(rows) for name, rows in parts.items()}


def _one(shot: Shot) -> dict[str, Any]:
    import pyarrow as pa

    number, mm, moment, snap = shot.number, shot.mm, shot.moment, shot.snap
    account = snap.accounting
    head = {
        "snapshot": number,
        "mm": mm,
        "pid": snap.pid,
        "time_ns": snap.time_ns,
        "moment": moment,
        "method": snap.method,
        "complete": snap.complete,
        "notes": "\n".join(snap.notes) or None,
        "status": json.dumps(account.status if account else {}),
        "until_ns": snap.until_ns if snap.until_ns >= 0 else None,
    }
    tables = {"snapshots": pa.Table.from_pylist([head], schema=schema("snapshots"))}
    vmas = [
        {
            "snapshot": number,
            "vma": i,
            "start": v.start,
            "end": v.end,
            "perms": v.perms,
            "offset": v.offset,
            "dev": v.dev,
            "inode": v.inode,
            "name": v.name,
            "vm_flags": None if v.vm_flags is None else " ".join(sorted(v.vm_flags)),
        }
        for i, v in enumerate(snap.vmas)
    ]
    tables["vmas"] = pa.Table.from_pylist(vmas, schema=schema("vmas"))
    if shot.files:
        tables["file_pages"] = _file_pages(number, shot.files)
    if snap.pages is not None:
        tables["pages"] = _pages(number, snap)
    if account is not None:
        tables["accounting"] = _accounting(number, snap)
    return tables


def _frames(shot: FrameShot) -> Any:
    import pyarrow as pa

    runs = shot.runs
    n = len(runs)
    offsets = np.concatenate((runs.first, [runs.pages])).astype("i4") if n else np.zeros(1, "i4")
    return pa.table(
        [
            pa.array(np.full(n, shot.mm, "i4")),
            pa.array(np.full(n, shot.time_ns, "i8")),
            pa.array(np.full(n, shot.until_ns, "i8")),
            pa.array(runs.start),
            pa.array(runs.count),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(runs.pfn, pa.uint64())),
        ],
        schema=schema("frames"),
    )


def _file_pages(number: int, files: tuple[FilePages, ...]) -> Any:
    import pyarrow as pa

    lengths = [len(f.start) for f in files]
    orders = np.concatenate([f.order for f in files])

    def per_file(values: list[Any], kind: Any) -> Any:
        return pa.array(np.repeat(np.array(values, dtype=object), lengths).tolist(), kind)

    return pa.table(
        [
            pa.array(np.full(sum(lengths), number, "i4")),
            per_file([f.dev for f in files], pa.string()),
            per_file([f.inode for f in files], pa.uint64()),
            per_file([f.path for f in files], pa.string()),
            pa.array(np.concatenate([f.start for f in files]).astype("i8")),
            pa.array(np.concatenate([f.count for f in files]).astype("i8")),
            pa.array(orders, mask=orders == UNKNOWN_ORDER),
        ],
        schema=schema("file_pages"),
    )


def _pages(number: int, snap: Snapshot) -> Any:
    import pyarrow as pa

    runs = snap.pages
    assert runs is not None
    n = len(runs)
    offsets = np.concatenate((runs.first, [runs.pages])).astype("i4") if n else np.zeros(1, "i4")

    def per_page(values: Any, kind: Any) -> Any:
        if values is None:
            return pa.nulls(n, pa.list_(kind))
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))

    return pa.table(
        [
            pa.array(np.full(n, number, "i4")),
            pa.array(runs.start),
            pa.array(runs.count),
            pa.array(runs.state),
            per_page(runs.pfn, pa.uint64()),
            per_page(runs.mapcount, pa.int64()),
            per_page(runs.kflags, pa.uint64()),
        ],
        schema=schema("pages"),
    )


def _accounting(number: int, snap: Snapshot) -> Any:
    import pyarrow as pa

    account = snap.accounting
    assert account is not None
    per_vma = account.per_vma
    n = 0 if per_vma is None else len(per_vma)
    columns = [pa.array(np.full(n + 1, number, "i4")), pa.array(np.arange(-1, n, dtype="i4"))]
    for name in SMAPS_FIELDS:
        values: list[int | None] = [account.total.get(name)]
        if per_vma is not None and name in account.fields:
            values += per_vma[:, account.fields.index(name)].tolist()
        else:
            values += [None] * n
        columns.append(pa.array(values, pa.int64()))
    return pa.table(columns, schema=schema("accounting"))
