"""One way out for every view: `--format table|json|csv|parquet`, `-o FILE`, `--force`.

A command hands over columns and rows; kinds decide how a value looks in each format: an address is "0x…" in
JSON and CSV, a share is 0 to 1 there and per cent in a table. Files are written aside and renamed, so a full
disk leaves no half-written file.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pagelens.cli.table import Col, render_table
from pagelens.vm.errors import UsageError

FORMATS = ("table", "json", "csv", "parquet")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every view has."""
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=FORMATS, default="table", help="how to print (default: table)")
    group.add_argument("-o", "--output", metavar="FILE", help="write to FILE instead of standard output")
    group.add_argument("--force", action="store_true", help="overwrite FILE")


def refuse_overwrite(path: Path, force: bool) -> None:
    """UsageError where `path` exists and `force` is not given."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force overwrites it")


def emit(
    args: argparse.Namespace,
    columns: Sequence[Col],
    rows: Iterable[Mapping[str, Any]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Print rows in the format that `args` asks for. Notes (method, completeness) follow a table on the same
    stream; with the machine formats they go to stderr, so that a pipe stays clean."""
    rows = list(rows)
    if args.format == "parquet":
        if not args.output:
            raise UsageError("--format parquet needs -o FILE")
        write_file(Path(args.output), _parquet(columns, rows), args.force)
    elif args.format == "json":
        write_text(args, json.dumps([_plain(columns, row) for row in rows], indent=1) + "\n")
    elif args.format == "csv":
        write_text(args, _csv(columns, rows))
    else:
        color, width = use_color(args), terminal_width(args)
        write_text(args, render_table(columns, rows, title=title, notes=notes, color=color, width=width))
        return
    for note in notes:
        sys.stderr.write(f"pagelens: {note}\n")


def emit_object(args: argparse.Namespace, value: Mapping[str, Any], text: str) -> None:
    """Print one object: JSON where asked for, else `text`."""
    if args.format == "json":
        write_text(args, json.dumps(value, indent=1) + "\n")
    elif args.format == "table":
        write_text(args, text if text.endswith("\n") else text + "\n")
    else:
        raise UsageError(f"--format {args.format} is for tables; use json here")


def use_color(args: argparse.Namespace) -> bool:
    """Colours only on a terminal, and never against NO_COLOR."""
    return not getattr(args, "output", None) and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def terminal_width(args: argparse.Namespace) -> int | None:
    """Characters of the terminal that standard output is; None where it is none."""
    if getattr(args, "output", None) or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def write_text(args: argparse.Namespace, text: str) -> None:
    """To -o FILE, or to standard output."""
    if args.output:
        write_file(Path(args.output), text.encode(), args.force)
    else:
        sys.stdout.write(text)


def write_file(path: Path, data: bytes, force: bool) -> None:
    """Aside, synced, renamed. UsageError where it exists and force is not given.

    A device or a pipe (/dev/null, /dev/stdout) is written to: a rename would put a file in its place."""
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb", buffering=0) as stream:
            stream.write(data)
        return
    refuse_overwrite(path, force)
    handle, name = tempfile.mkstemp(dir=path.parent or Path(), prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _plain(columns: Sequence[Col], row: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for column in columns:
        value = row.get(column.name)
        if value is not None and column.kind == "addr":
            value = f"{int(value):#x}"
        elif value is not None and hasattr(value, "item"):
            value = value.item()
        out[column.name] = value
    return out


def _csv(columns: Sequence[Col], rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [c.name for c in columns], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = _plain(columns, row)
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in plain.items()})
    return stream.getvalue()


_ARROW = {
    "int": "int64",
    "addr": "uint64",
    "bytes": "int64",
    "share": "float64",
    "float": "float64",
    "ns": "int64",
    "moment": "int64",
    "bool": "bool_",
    "str": "string",
}


def _parquet(columns: Sequence[Col], rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for column in columns:
        values = [row.get(column.name) for row in rows]
        kind = pa.list_(pa.string()) if column.kind == "list" else getattr(pa, _ARROW[column.kind])()
        if column.kind == "list":
            values = [None if v is None else [str(x) for x in v] for v in values]
        arrays[column.name] = pa.array(values, kind)
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink)
    return sink.getvalue()
