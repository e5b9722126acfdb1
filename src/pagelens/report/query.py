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
_JOINED = ("cause", "confidence")  # columns of `causes` in the view `events`, null before `why` has run


def connect(capture: Capture, causes: Any = None) -> Any:
    """A DuckDB connection (in memory) with a view for each table of the capture and of derived/.

    causes: the verdicts as a pyarrow.Table, where they could not be written to derived/.
    """
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads TO 2")
    for name in TABLES:
        _view(connection, name if name != "events" else "recorded_events", capture.parts(name), name)
    derived = capture.path / DERIVED
    extra = {p.name: sorted(p.glob("part-*.parquet")) for p in sorted(derived.glob("*")) if p.is_dir()}
    if causes is not None:
        connection.register("causes", causes)
    elif extra.get("causes"):
        _view(connection, "causes", extra.pop("causes"), "")
    known = causes is not None or "causes" in _views(connection)
    extra.pop("causes", None)
    if known:
        have = {r[0] for r in connection.execute("DESCRIBE causes").fetchall()}
        chosen = ", ".join(f"d.{n}" if n in have else f"NULL::VARCHAR AS {n}" for n in _JOINED)
        join = "LEFT JOIN causes d USING (seq)"
    else:
        chosen = ", ".join(f"NULL::VARCHAR AS {n}" for n in _JOINED)
        join = ""
    connection.execute(f"CREATE VIEW events AS SELECT e.*, {chosen} FROM recorded_events e {join}")
    for name, parts in extra.items():
        if parts:
            _view(connection, f"derived_{name}" if name in TABLES else name, parts, "")
    return connection


def _views(connection: Any) -> set[str]:
    return {r[0] for r in connection.execute("SELECT view_name FROM duckdb_views()").fetchall()}


def conclude(capture: Capture) -> Any:
    """Have `why` judge all faults: None where derived/causes holds the verdicts now, else (a capture that
    cannot be written) the table itself."""
    from pagelens.why import derived

    try:
        derived.derive(capture)
    except OSError:
        return derived.table(derived.classify(capture))
    return None


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
