"""SQL over a capture with DuckDB: each table a view, `events` with what `why` concluded joined in.

The recorder writes facts, `why` writes derived/TABLE/part-*.parquet; derived/events has the column seq and
one row for each event it speaks about. A capture without derived/ has the same columns, null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagelens.capture.reader import Capture
from pagelens.capture.tables import TABLES, schema
from pagelens.vm.errors import UsageError

DERIVED = "derived"
ADDRESSES = frozenset({"addr", "ip", "start", "end", "page", "address"})
# Columns of derived/events that are always there, null before `why` has run.
_CAUSE = {"cause": "VARCHAR"}


def connect(capture: Capture) -> Any:
    """A DuckDB connection (in memory) with a view for each table of the capture and of derived/."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads TO 2")
    for name in TABLES:
        _view(connection, name if name != "events" else "recorded_events", capture.parts(name), name)
    derived = capture.path / DERIVED
    extra = {p.name: sorted(p.glob("part-*.parquet")) for p in sorted(derived.glob("*")) if p.is_dir()}
    columns: list[str] = []
    if extra.get("events"):
        _view(connection, "derived_events", extra["events"], "")
        names = [r[0] for r in connection.execute("DESCRIBE derived_events").fetchall()]
        columns = [n for n in names if n not in {f.name for f in schema("events")}]
    missing = [f"NULL::{kind} AS {n}" for n, kind in _CAUSE.items() if n not in columns]
    chosen = ", ".join(["e.*", *(f'd."{n}"' for n in columns), *missing])
    join = "LEFT JOIN derived_events d USING (seq)" if columns else ""
    connection.execute(f"CREATE VIEW events AS SELECT {chosen} FROM recorded_events e {join}")
    for name, parts in extra.items():
        if name != "events" and parts:
            _view(connection, f"derived_{name}" if name in TABLES else name, parts, "")
    return connection


def _view(connection: Any, view: str, parts: list[Path], table: str) -> None:
    if parts:
        files = ", ".join("'" + str(p).replace("'", "''") + "'" for p in parts)
        connection.execute(
            f'CREATE VIEW "{view}" AS SELECT * FROM read_parquet([{files}], union_by_name=true)'
        )
    else:
        connection.register(view, schema(table).empty_table())


def run(connection: Any, sql: str) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """(name and kind of each column, rows). Kinds are those of cli.output. UsageError for SQL that is
    wrong."""
    import duckdb

    try:
        result = connection.execute(sql)
        if result.description is None:
            return [], []
        names = [d[0] for d in result.description]
        types = [str(d[1]).upper() for d in result.description]
        rows = result.fetchall()
    except duckdb.Error as error:
        raise UsageError(f"SQL: {str(error).splitlines()[0]}") from None
    columns = [(name, _kind(name, kind)) for name, kind in zip(names, types, strict=True)]
    out = []
    for row in rows:
        values = {}
        for (name, kind), value in zip(columns, row, strict=True):
            values[name] = [f"{v:#x}" for v in value] if kind == "addresses" and value is not None else value
        out.append(values)
    return [(n, "list" if k == "addresses" else k) for n, k in columns], out


def _kind(name: str, kind: str) -> str:
    if kind.endswith("[]"):
        return "addresses" if kind.startswith("UBIGINT") else "list"
    if kind == "UBIGINT" and name in ADDRESSES:
        return "addr"
    if kind in ("DOUBLE", "FLOAT") or kind.startswith("DECIMAL"):
        return "float"
    if "INT" in kind:
        return "int"
    return "bool" if kind == "BOOLEAN" else "str"
