"""`pagelens case`."""

from __future__ import annotations

import argparse
import sys
import time

from pagelens.cli.output import add_output_arguments, emit_object
from pagelens.vm.errors import UsageError


class Command:
    """Questions that people really ask, each run live here and answered with its evidence.

    Without a number: the list. `--tour`: the short answers of all of them, in under a minute.

      pagelens case
      pagelens case 11
      pagelens case 2 --format json
      pagelens case --tour
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("number", nargs="?", type=int, metavar="N", help="which question")
        parser.add_argument("--tour", action="store_true", help="all of them, in short")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Exit code 0; 3 where a single case lacks what it cannot do without."""
        from pagelens.report import cases
        from pagelens.report.cases.text import as_dict, text_lines

        if args.tour:
            from pagelens.report.cases.tour import tour

            if args.number is not None or args.format not in ("table", "json"):
                raise UsageError("--tour takes no number, and prints text")
            return tour(sys.stdout)
        if args.number is None:
            rows = [{"number": e.number, "question": e.question} for e in cases.ENTRIES]
            text = "".join(f"  {e.number:>2}  {e.question}\n" for e in cases.ENTRIES)
            emit_object(
                args, {"cases": rows}, text + "\nrun one: pagelens case N; all in short: pagelens case --tour"
            )
            return 0
        entry = next((e for e in cases.ENTRIES if e.number == args.number), None)
        if entry is None:
            numbers = ", ".join(str(e.number) for e in cases.ENTRIES)
            raise UsageError(f"no case {args.number} here yet (there are: {numbers})")
        with cases.Lab() as lab:
            began = time.monotonic()
            answer = cases.run(entry, lab)
            emit_object(args, as_dict(answer), "\n".join(text_lines(answer, time.monotonic() - began)))
        return 0
