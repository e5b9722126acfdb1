"""Reading a capture: finished parts, and what is missing.

Every table is a directory of Parquet parts, so any tool reads it; this reader adds the checks (is it a
capture, is its version known, was the recorder killed) and the snapshots as `vm.Snapshot`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.capture.directory import CaptureDirectory
from pagelens.capture.tables import TABLES, schema
from pagelens.vm.accounting import Accounting
from pagelens.vm.errors import DamagedInputError, UsageError
from pagelens.vm.pages import PageRuns
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.vma import Vma, VmaList


class Capture(CaptureDirectory):
    """A capture on disk, read only: a `CaptureDirectory` with its tables."""

    def table(self, name: str, columns: Sequence[str] | None = None) -> Any:
        """A whole table as pyarrow.Table, rows as written; empty with the right schema when there is none.

        DamagedInputError where a part cannot be read.
        """
        import pyarrow as pa

        if name not in TABLES:
            raise UsageError(f"no table {name!r} (there are: {', '.join(TABLES)})")
        wanted = schema(name)
        if columns is not None:
            wanted = pa.schema([wanted.field(c) for c in columns])
        tables = []
        for path in self.parts(name):
            tables.append(read_part(path, columns))
        if not tables:
            return wanted.empty_table()
        return pa.concat_tables(tables, promote_options="default").unify_dictionaries()

    def events(self, columns: Sequence[str] | None = None) -> Any:
        """`events` in order of (time_ns, seq)."""
        if columns is not None and not {"time_ns", "seq"} <= set(columns):
            table = self.table("events", [*columns, *({"time_ns", "seq"} - set(columns))])
        else:
            table = self.table("events", columns)
        time = table.column("time_ns").to_numpy()
        if len(time) and np.any(np.diff(time) < 0):
            table = table.sort_by([("time_ns", "ascending"), ("seq", "ascending")])
        return table if columns is None else table.select(list(columns))

    def snapshot_rows(self) -> list[dict[str, Any]]:
        """`snapshots` as dicts: snapshot, mm, pid, time_ns, moment, method, complete, notes, status, until_ns."""
        rows: list[dict[str, Any]] = self.table("snapshots").to_pylist()
        return rows

    def snapshot(self, number: int) -> Snapshot:
        """One snapshot. UsageError if there is none of that number."""
        import pyarrow.compute as pc

        row = next((r for r in self.snapshot_rows() if r["snapshot"] == number), None)
        if row is None:
            raise UsageError(f"the capture has no snapshot {number}")

        def mine(name: str) -> Any:
            table = self.table(name)
            return table.filter(pc.equal(table.column("snapshot"), number))

        vmas = [vma_of(v) for v in mine("vmas").sort_by("vma").to_pylist()]
        accounting = _accounting(mine("accounting"), row["status"])
        return replace(snapshot_of(row, vmas, _pages(mine("pages"))), accounting=accounting)


def vma_of(row: dict[str, Any]) -> Vma:
    """The vma of a row of `vmas`."""
    prot, shared = Vma.parse_perms(row["perms"])
    flags = None if row["vm_flags"] is None else frozenset(row["vm_flags"].split())
    return Vma(
        row["start"], row["end"], prot, shared, row["offset"], row["dev"], row["inode"], row["name"], flags
    )


def snapshot_of(row: dict[str, Any], vmas: Iterable[Vma], pages: PageRuns | None) -> Snapshot:
    """The snapshot of a row of `snapshots` and what belongs to it, without accounting."""
    return Snapshot(
        pid=row["pid"],
        time_ns=row["time_ns"],
        vmas=VmaList(vmas),
        pages=pages,
        method=row["method"],
        complete=row["complete"],
        notes=tuple((row["notes"] or "").splitlines()),
        until_ns=-1 if row.get("until_ns") is None else row["until_ns"],
    )


def read_part(path: Path, columns: Sequence[str] | None = None) -> Any:
    """One part as pyarrow.Table. DamagedInputError where it cannot be read, or has not those columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By this thread alone: read_table's threads hold on to a third of the peak of a million faults.
        with pq.ParquetFile(path, pre_buffer=False) as part:
            table = part.read(columns=None if columns is None else list(columns), use_threads=False)
        return table if columns is None else table.select(list(columns))
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from None


_BATCH = 1 << 16


def rows_of(path: Path) -> int:
    """Rows of one part. DamagedInputError where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from None


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """One part as pyarrow.RecordBatches of some rows each. DamagedInputError where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as part:
            yield from part.iter_batches(_BATCH, columns=list(columns), use_threads=False)
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DamagedInputError:
    return DamagedInputError(f"{path} is damaged or cannot be read: {str(error).splitlines()[0]}")


def plain(column: Any, null: int) -> npt.NDArray[Any]:
    """An Arrow column as numpy array of its own width, `null` for nulls; a view of Arrow's memory where it can be.

    `to_numpy` makes floats of a column with nulls, and `fill_null` before it a second copy of all.
    """
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    if len(chunks) != 1:
        parts = [plain(chunk, null) for chunk in chunks]
        return np.concatenate(parts) if parts else np.empty(0, column.type.to_pandas_dtype())
    (array,) = chunks
    valid, data = array.buffers()
    if array.type.bit_width == 1:
        values = _bits(data, array.offset, len(array))
    else:
        kind = np.dtype(array.type.to_pandas_dtype())
        values = np.frombuffer(data, kind)[array.offset : array.offset + len(array)]
    if array.null_count and valid is not None:
        values = np.where(_bits(valid, array.offset, len(array)), values, values.dtype.type(null))
    return values


def _bits(buffer: Any, offset: int, length: int) -> npt.NDArray[np.bool_]:
    first = offset // 8
    packed = np.frombuffer(buffer, np.uint8)[first : (offset + length + 7) // 8]
    bits = np.unpackbits(packed, bitorder="little")[offset - 8 * first :][:length]
    return bits.view(np.bool_)


def _pages(table: Any) -> PageRuns | None:
    if not table.num_rows:
        return None

    def flat(name: str, dtype: str) -> Any:
        column = table.column(name).combine_chunks()
        if column.null_count == len(column):
            return None
        return column.flatten().to_numpy(zero_copy_only=False).astype(dtype)

    return PageRuns(
        table.column("start").to_numpy(),
        table.column("count").to_numpy(),
        table.column("state").to_numpy(),
        flat("pfn", "u8"),
        flat("mapcount", "i8"),
        flat("kflags", "u8"),
    )


def _accounting(table: Any, status: str) -> Accounting | None:
    if not table.num_rows:
        return None
    fields = [n for n in table.column_names[2:] if table.column(n).null_count < table.num_rows]
    rows = table.sort_by("vma").to_pylist()
    total = {f: int(rows[0][f] or 0) for f in fields} if rows[0]["vma"] == -1 else {}
    per_vma = np.array([[r[f] or 0 for f in fields] for r in rows if r["vma"] >= 0], dtype=np.int64)
    return Accounting(
        tuple(fields), per_vma.reshape(-1, len(fields)) if len(per_vma) else None, total, json.loads(status)
    )
