"""Snapshots into rows of the capture's tables."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pagelens.capture.tables import schema
from pagelens.vm.accounting import SMAPS_FIELDS
from pagelens.vm.snapshot import Snapshot


def to_tables(number: int, mm: int | None, moment: str, snap: Snapshot) -> dict[str, Any]:
    """pyarrow tables `snapshots`, `vmas`, `pages`, `accounting` of one snapshot."""
    import pyarrow as pa

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
    if snap.pages is not None:
        tables["pages"] = _pages(number, snap)
    if account is not None:
        tables["accounting"] = _accounting(number, snap)
    return tables


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
