"""pagelens verify."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.cli.output import add_output_arguments, emit_object
from pagelens.vm.units import format_size


class Command:
    """Check a checkpoint: every bit of it and of every checkpoint that it needs.

    Exit code 0: all good. 1: damaged or incomplete; each problem is named.
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("checkpoint", type=Path, metavar="DIR")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Verify."""
        from pagelens.checkpoint.verify import verify

        verdict = verify(args.checkpoint)
        value = {
            "path": str(verdict.path),
            "ok": verdict.ok,
            "checked": verdict.checked,
            "pages": verdict.pages,
            "bytes": verdict.bytes,
            "problems": verdict.problems,
        }
        text = "".join(f"{problem}\n" for problem in verdict.problems)
        text += (
            f"{verdict.path}: {'ok' if verdict.ok else 'DAMAGED'}; {len(verdict.checked)} checkpoints, "
            f"{verdict.pages:,} pages, {format_size(verdict.bytes)} checked"
        )
        emit_object(args, value, text)
        return 0 if verdict.ok else 1
