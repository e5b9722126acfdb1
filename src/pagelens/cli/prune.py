"""pagelens prune."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.cli.output import add_output_arguments, emit_object
from pagelens.vm.errors import UsageError


class Command:
    """Drop checkpoints of a chain, or merge one with all that it needs.

      pagelens prune --drop chain/000000 chain/000001 --keep chain/000002 chain/000003
      pagelens prune --merge chain/000003 -o alone

    --keep must name every checkpoint that needs a dropped one; the contents that it needs move into it. If it
    was killed, the same command again does the rest.
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        for name, text in (("--drop", "delete these"), ("--keep", "these stay whole")):
            parser.add_argument(
                name, action="extend", nargs="+", type=Path, metavar="DIR", default=[], help=text
            )
        parser.add_argument("--merge", type=Path, metavar="DIR", help="write DIR, with all it needs, to -o")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Drop or merge."""
        from pagelens.checkpoint import prune

        if args.merge is not None:
            if args.drop or not args.output:
                raise UsageError("--merge DIR needs -o OUT, and does not go with --drop")
            out = Path(args.output)
            args.output = None
            prune.merge(args.merge, out, force=args.force)
            emit_object(args, {"merged": str(args.merge), "to": str(out)}, f"{out}: {args.merge}, whole")
            return 0
        if not args.drop:
            raise UsageError("nothing to do: give --drop DIR… or --merge DIR")
        done = prune.drop(args.drop, args.keep)
        value = {
            "dropped": [str(p) for p in done.dropped],
            "rewritten": [str(p) for p in done.rewritten],
            "gone": [str(p) for p in done.gone],
        }
        text = f"dropped {len(done.dropped)}, rewrote {len(done.rewritten)}"
        gone = f"; already gone: {', '.join(map(str, done.gone))}" if done.gone else ""
        emit_object(args, value, text + gone)
        return 0
