"""pagelens merge."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.cli.output import add_output_arguments, emit_object
from pagelens.vm.errors import UsageError


class Command:
    """Write a checkpoint, with all that it needs of others, as one that stands alone.

      pagelens merge chain/000003 -o alone

    The chain stays as it is; `pagelens prune` drops what is not needed any more.
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("checkpoint", type=Path, metavar="DIR")
        add_output_arguments(parser)
        for action in parser._actions:
            if action.dest == "output":
                action.metavar, action.help = "OUT", "the checkpoint to write"

    def run(self, args: argparse.Namespace) -> int:
        """Merge."""
        from pagelens.checkpoint import prune

        if not args.output:
            raise UsageError("where to? give -o OUT")
        out = Path(args.output)
        args.output = None  # the rest of the output goes to stdout
        prune.merge(args.checkpoint, out, force=args.force)
        emit_object(
            args, {"merged": str(args.checkpoint), "to": str(out)}, f"{out}: {args.checkpoint}, whole"
        )
        return 0
