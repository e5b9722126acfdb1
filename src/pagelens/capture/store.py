"""Writing a capture: the directory, its parts, meta.json.

Each file is written aside, synced and renamed, so that a reader (or a crash) sees whole files only. A
segment's `events` part is renamed last: where it exists the segment is done, and converting it again is
harmless.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagelens.capture import convert
from pagelens.capture.directory import META, RESERVE, SCHEMA_VERSION, SPOOL
from pagelens.capture.tables import schema
from pagelens.linux.disk import sync
from pagelens.vm.errors import UsageError

_RESERVE = 4 << 20  # bytes: some 100,000 faults, converted


class CaptureWriter:
    """A capture directory that is being written."""

    def __init__(self, path: Path, meta: dict[str, Any], *, force: bool = False, max_size: int = 0) -> None:
        """Makes the directory. max_size: bytes of events parts to keep (the newest), 0 for all.

        UsageError where something is in the way.
        """
        self.path = path
        self.spool = path / SPOOL
        self._max_size = max_size
        self._parts: dict[str, int] = {}
        self._event_parts: list[tuple[Path, int, int, int]] = []  # path, bytes, rows, completed faults
        self.meta = {"schema_version": SCHEMA_VERSION, "format": "pagelens capture", **meta}
        self.next_seq = 0
        self.recorded = 0
        self.dropped_rows = 0
        self.dropped_faults = 0
        if path.exists():
            if not force:
                raise UsageError(f"{path} exists; --force overwrites it")
            if not (path / META).is_file():
                raise UsageError(f"{path} is not a capture; it is not overwritten")
            shutil.rmtree(path)
        try:
            self.spool.mkdir(parents=True)
            self.write_meta()
            self._reserve()
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise UsageError(
                f"the capture cannot be written to {path}: {error.strerror}; -c DIR names another place"
            ) from None

    def _reserve(self) -> None:
        # Room on the disk for the end: where it is full, what was recorded still has to be converted, and what was lost
        # to be written down.
        room = os.statvfs(self.path)
        size = min(_RESERVE, room.f_bavail * room.f_frsize // 4)
        with contextlib.suppress(OSError), open(self.path / RESERVE, "wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)

    def release(self, *, all_of_it: bool) -> bool:
        """Give the reserve back, or all but its last quarter, to a disk that is full. False: there is none."""
        place = self.path / RESERVE
        try:
            size = place.stat().st_size
            if all_of_it:
                place.unlink()
            else:
                os.truncate(place, size // 4)
        except OSError:
            return False
        return size > 0

    @classmethod
    def reopen(cls, path: Path, meta: dict[str, Any]) -> CaptureWriter:
        """For `recover`: go on in a directory that a killed recorder left."""
        self = cls.__new__(cls)
        self.path, self.spool, self.meta = path, path / SPOOL, meta
        self._max_size, self._parts, self._event_parts = 0, {}, []
        self.next_seq = self.recorded = self.dropped_rows = self.dropped_faults = 0
        return self

    def write_meta(self, **changes: Any) -> None:
        """Update meta.json."""
        self.meta.update(changes)
        write_json(self.path / META, self.meta)

    def write(self, table: str, rows: Any, part: int | None = None) -> Path:
        """Write a part: a pyarrow.Table, or a list of dicts. part: its number (default: the next)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if isinstance(rows, list):
            rows = pa.Table.from_pylist(rows, schema=schema(table))
        number = self._parts.get(table, 0) if part is None else part
        self._parts[table] = number + 1
        directory = self.path / table
        if not directory.is_dir():
            directory.mkdir()
            sync(self.path)
        final = directory / f"part-{number:08d}.parquet"
        aside = directory / f".part-{number:08d}.new"
        try:
            pq.write_table(rows, aside, **encoding(table, rows.column_names))
            sync(aside)
            aside.replace(final)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync(directory)
        return final

    def add_segment(self, segment: int) -> convert.Converted:
        """Convert a finished segment, then delete its spool files. OSError (a full disk) leaves them."""
        done = convert.convert(self.spool, segment, self.next_seq)
        events = done.tables.pop("events", None)
        for table, rows in done.tables.items():
            self.write(table, rows, part=segment)
        if events is not None:
            path = self.write("events", events, part=segment)
            self._event_parts.append((path, path.stat().st_size, done.rows, done.recorded))
        self.next_seq += done.rows
        self.recorded += done.recorded
        convert.remove_segment(self.spool, segment)
        if self._max_size:
            self._trim()
        return done

    def _trim(self) -> None:
        # Ring-buffer mode: the oldest parts of events go; stacks stay, newer events refer to them.
        while len(self._event_parts) > 1 and sum(p[1] for p in self._event_parts) > self._max_size:
            path, _, rows, recorded = self._event_parts.pop(0)
            path.unlink(missing_ok=True)
            self.dropped_rows += rows
            self.dropped_faults += recorded

    def lose(self, what: str, count: int, note: str) -> None:
        """Write down a loss."""
        self.write("losses", [{"time_ns": time.monotonic_ns(), "what": what, "count": count, "note": note}])

    def finish(self, **changes: Any) -> None:
        """Unwind the raw stacks, remove the empty spool and write the last meta.json."""
        self.release(all_of_it=True)
        from pagelens.capture.unwinding import resolve

        stacks, cut = resolve(self)
        if stacks:
            changes["unwound"] = {"stacks": stacks, "cut_off": cut}
        for path in self.spool.glob("*"):
            if not path.stat().st_size:
                path.unlink()
        with contextlib.suppress(OSError):  # segments that could not be converted stay for `recover`
            self.spool.rmdir()
        self.write_meta(**changes)


# Columns of `events` whose values hardly repeat but lie close together.
_CLOSE = ("seq", "time_ns", "addr", "latency_ns")


def encoding(table: str, columns: Sequence[str]) -> dict[str, Any]:
    """How the columns of a table are written (arguments of pyarrow.parquet.write_table).

    Arrow tries a dictionary first, of every column, and gives up when it is full: for columns that hardly repeat that
    takes two and a half times as long, and three times the space, of storing differences.
    """
    close = [c for c in columns if c in _CLOSE] if table in ("events", "causes") else []
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [c for c in columns if c not in close],
        "column_encoding": dict.fromkeys(close, "DELTA_BINARY_PACKED") or None,
    }


def write_json(path: Path, value: Any) -> None:
    """Aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "w") as stream:
        json.dump(value, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
