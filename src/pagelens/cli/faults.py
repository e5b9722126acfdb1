"""`pagelens faults`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.cli.output import add_output_arguments, emit
from pagelens.cli.table import Col
from pagelens.vm.errors import UsageError

FIGURES = (
    Col("faults", kind="int"),
    Col("share", kind="share", spare=1),
    Col("pages", kind="int", spare=3),
    Col("minor", kind="int", spare=5),
    Col("major", kind="int", spare=2),
    Col("user", kind="int", spare=4),
    Col("kernel", kind="int", spare=4),
    Col("time_ns", "time", "ns"),
)
EXTRA = {
    "function": (Col("module", spare=1),),
    "line": (Col("line"), Col("module", spare=5)),
    "stack": (),
    "python": (Col("file"),),
    "vma": (
        Col("kind", spare=1),
        Col("mm", kind="int", spare=5),
        Col("start", kind="addr"),
        Col("end", kind="addr"),
        Col("mapped_by", spare=2),
    ),
    "region": (Col("kind"),),
    "thread": (),
    "process": (),
    "kind": (),
}


class Command:
    """Faults of a capture by function, line, call stack, Python function, region, vma, thread, process or kind.

    pages counts distinct pages. user and kernel: where the access came from; for the kernel's, the function
    is the one that made the system call. time is the sum of the faults' own latencies.
    --by python: the innermost Python function where the interpreter names it (3.12 and later with -X perf; stacks
    reach it with `run --detail full`), else the C function.

      $ pagelens faults out.plens
      $ pagelens faults out.plens --by stack --top 10
      $ pagelens faults out.plens --by kind --format json
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("capture_path", nargs="?", metavar="CAPTURE", help="a capture")
        parser.add_argument("-c", "--capture", metavar="DIR", help="likewise")
        parser.add_argument("--by", choices=tuple(EXTRA), default="function", help="rows (default: function)")
        parser.add_argument("--top", type=int, default=30, metavar="N", help="rows (default: 30; 0: all)")
        parser.add_argument("--depth", type=int, default=8, metavar="N", help="frames with --by stack")
        parser.add_argument("--failed", action="store_true", help="the faults that did not complete")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Load, group, print."""
        from pagelens.capture.reader import Capture
        from pagelens.report import faults as report

        path = args.capture or args.capture_path
        if not path:
            raise UsageError("faults needs a capture: pagelens faults DIR")
        capture = Capture(Path(path))
        loaded = report.load(capture, failed=args.failed)
        rows = report.group(loaded, args.by, depth=args.depth)
        shown = rows[: args.top] if args.top else rows
        if args.by == "vma":
            who = report.mappers(loaded, [r["made_by"] for r in shown if r.get("made_by", -1) >= 0])
            shown = [{**r, "mapped_by": who.get(r.get("made_by", -1)) or None} for r in shown]
        what = "faults that did not complete" if args.failed else "completed faults"
        notes = [f"{len(loaded):,} {what}; {capture.meta.get('method', '?')}"]
        if len(shown) < len(rows):
            rest = sum(r["faults"] for r in rows[len(shown) :])
            notes.append(f"{len(rows) - len(shown):,} more rows with {rest:,} faults (--top 0 shows all)")
        if args.by in ("function", "line", "stack"):
            missing, total = report.unnamed(loaded)
            share = 100 * missing / total if total else 0.0
            notes.append(f"{missing:,} of {total:,} faults ({share:.1f} %) have no function name")
        if args.by == "python":
            from pagelens.report.chains import python_share

            shown_in, total = python_share(loaded)
            share = 100 * shown_in / total if total else 0.0
            notes.append(
                f"{shown_in:,} of {total:,} faults ({share:.1f} %) with a Python function, the rest by C function"
            )
        if args.by in ("stack", "python"):
            notes.append(report.stack_quality(loaded))
        # The first column is named after --by; with --by line that is the function, beside its line.
        first = "function" if args.by == "line" else args.by
        shown = [{**row, first: row["what"]} for row in shown]
        emit(args, (Col(first), *EXTRA[args.by], *FIGURES), shown, notes=[*notes, *capture.missing])
        return 0
