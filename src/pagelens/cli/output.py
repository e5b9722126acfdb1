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
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagelens.vm.errors import UsageError
from pagelens.vm.units import format_size

FORMATS = ("table", "json", "csv", "parquet")


@dataclass(frozen=True, slots=True)
class Col:
    """One column of a view. kind: str, int, float, addr, bytes, share, ns, bool, list."""

    name: str
    title: str = ""
    kind: str = "str"


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
        write_text(args, render_table(columns, rows, title=title, notes=notes, color=use_color(args)))
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


def cell(kind: str, value: Any) -> str:
    """A value as a person reads it in a table."""
    if value is None:
        return "-"
    match kind:
        case "addr":
            return f"{int(value):012x}"
        case "bytes":
            return format_size(int(value))
        case "share":
            return f"{100 * float(value):.1f} %"
        case "ns":
            return format_ns(float(value))
        case "int":
            return f"{int(value):,}"
        case "float":
            return f"{float(value):.3g}"
        case "bool":
            return "yes" if value else "no"
        case "list":
            return " ".join(str(v) for v in value)
    return str(value)


def format_ns(ns: float) -> str:
    """A duration for people."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if abs(ns) >= scale:
            return f"{ns / scale:.3g} {unit}"
    return f"{ns:.0f} ns"


_RIGHT = {"int", "bytes", "share", "ns", "float"}


def render_table(
    columns: Sequence[Col],
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    color: bool = False,
) -> str:
    """A table as text, as wide as the terminal (or as needed in a pipe: nothing is cut there)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        right = column.kind in _RIGHT
        table.add_column(
            column.title or column.name,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right or column.kind == "addr",
        )
    for row in rows:
        table.add_row(*(Text(cell(c.kind, row.get(c.name))) for c in columns))
    stream = io.StringIO()
    width = None if color else _pipe_width(columns, rows)
    console = Console(file=stream, force_terminal=color, no_color=not color, width=width, highlight=False)
    console.print(table)
    for note in notes:
        console.print(Text(note))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _pipe_width(columns: Sequence[Col], rows: Sequence[Mapping[str, Any]]) -> int:
    widths = [
        max([len(c.title or c.name), *(len(cell(c.kind, row.get(c.name))) for row in rows)]) for c in columns
    ]
    return max(100, sum(widths) + 3 * len(widths) + 2)


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
