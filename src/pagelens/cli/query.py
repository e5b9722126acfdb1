"""`pagelens query`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.cli.output import add_output_arguments, emit
from pagelens.cli.table import Col
from pagelens.vm.errors import UsageError


class Command:
    """SQL (DuckDB) over a capture: events, stacks, mms, tasks, snapshots, vmas, pages, accounting, losses.

    `events` has what `pagelens why` concludes (cause, confidence) joined in. Without SQL: tables and columns.

      $ pagelens query out.plens "select kind, count(*) as n from events group by kind"
      $ pagelens query out.plens "select * from events where kind = 'fault' and major" --format json
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument(
            "words", nargs="*", metavar="CAPTURE SQL", help="a capture (or -c) and a statement"
        )
        parser.add_argument("-c", "--capture", metavar="DIR", help="a capture")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Connect, run, print."""
        from pagelens.capture.reader import Capture
        from pagelens.report import query

        words = list(args.words)
        path = args.capture or (words.pop(0) if words else None)
        if not path:
            raise UsageError("query needs a capture: pagelens query DIR SQL")
        if len(words) > 1:
            raise UsageError("the SQL must be one argument: put it in quotes")
        capture = Capture(Path(path))
        judged = words and ("cause" in words[0].lower() or "confidence" in words[0].lower())
        connection = query.connect(capture, query.conclude(capture) if judged else None)
        sql = words[0] if words else (
            "select table_name as \"table\", column_name as \"column\", data_type as type "
            "from information_schema.columns where table_name not in ('recorded_events', 'derived_events') "
            "order by table_name, ordinal_position"
        )  # fmt: skip
        columns, rows = query.run(connection, sql)
        emit(args, [Col(name, kind=kind) for name, kind in columns], rows, notes=capture.missing)
        return 0
