"""Rows as a table for people: everything in a pipe; on a terminal what fits its width, and a note of what does not."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagelens.vm.units import format_size

_RIGHT = {"int", "bytes", "share", "ns", "moment", "float"}
_TEXT = {"str", "list"}
_GAP = 3  # characters between two columns
_READABLE = 24  # a column of text is not folded below this for the sake of columns that can be spared
_LEAST = 12  # nor below this for anything: better a line that the terminal wraps


@dataclass(frozen=True, slots=True)
class Col:
    """One column of a view. kind: str, int, float, addr, bytes, share, ns, bool, list. spare: where a terminal is too
    narrow, columns with the greatest go first; 0: never."""

    name: str
    title: str = ""
    kind: str = "str"
    spare: int = 0

    @property
    def head(self) -> str:
        """What stands above it."""
        return self.title or self.name


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
        case "moment":
            return f"{float(value) / 1e6:,.3f} ms"
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


def render_table(
    columns: Sequence[Col],
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    color: bool = False,
    width: int | None = None,
) -> str:
    """A table as text. width: characters of the terminal; None: not a terminal, nothing is left out or folded."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = {c.name: [cell(c.kind, row.get(c.name)) for row in rows] for c in columns}
    natural = {c.name: max(map(len, (c.head, *cells[c.name]))) for c in columns}
    shown = list(columns) if width is None else _that_fit(columns, natural, width)
    table = Table(
        title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in shown:
        right = column.kind in _RIGHT
        table.add_column(
            column.head,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right or column.kind == "addr",
            min_width=_least(column, natural, _LEAST) if width else natural[column.name],
        )
    for texts in zip(*(cells[c.name] for c in shown), strict=True):
        table.add_row(*map(Text, texts))
    if width is None:
        room = max(100, _need(shown, natural, None))
    else:
        room = max(width, _need(shown, natural, _LEAST))
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=color, no_color=not color, width=room, highlight=False)
    console.print(table)
    for note in notes:
        console.print(Text(note))
    if len(shown) < len(columns):
        names = ", ".join(c.head for c in columns if c not in shown)
        console.print(Text(f"not shown, for want of width: {names} (a pipe or --format shows all)"))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _that_fit(columns: Sequence[Col], natural: Mapping[str, int], width: int) -> list[Col]:
    shown = list(columns)
    for spare in sorted({c.spare for c in columns if c.spare}, reverse=True):
        if _need(shown, natural, _READABLE) <= width:
            break
        shown = [c for c in shown if c.spare != spare]
    return shown


def _least(column: Col, natural: Mapping[str, int], floor: int | None) -> int:
    foldable = floor is not None and column.kind in _TEXT
    return min(natural[column.name], max(floor or 0, len(column.head))) if foldable else natural[column.name]


def _need(columns: Sequence[Col], natural: Mapping[str, int], floor: int | None) -> int:
    # Characters that a line takes where text is folded down to `floor`; None: nowhere.
    return sum(_least(c, natural, floor) + _GAP for c in columns) + 2
