"""`pagelens recover`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.cli.output import emit_object
from pagelens.vm.errors import UsageError


class Command:
    """Finish a capture whose recorder was killed: converts the raw spool that it left behind.

    What had not left the kernel's ring when it was killed is gone, and so are the counters of tasks that
    still ran.
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("capture_path", nargs="?", metavar="CAPTURE", help="the capture")
        parser.add_argument("-c", "--capture", metavar="DIR", help="likewise")
        parser.add_argument("--format", choices=("table", "json"), default="table", help="how to print")
        parser.set_defaults(output=None, force=False)

    def run(self, args: argparse.Namespace) -> int:
        """Exit code 0 also where nothing was left to do."""
        from pagelens.capture.recover import recover

        path = args.capture or args.capture_path
        if not path:
            raise UsageError("recover needs a capture: pagelens recover DIR")
        done = recover(Path(path))
        emit_object(
            args,
            done,
            f"{path}: {done['segments']} segments, {done['rows']:,} events,"
            f" {done['truncated_bytes']} bytes of cut-off rows",
        )
        return 0
