"""pagelens export."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagelens.vm.errors import UsageError

CHECKPOINT_FORMATS = ("core", "criu")


class Command:
    """Write a checkpoint in another program's format.

    pagelens export DIR --to core -o FILE    an ELF core file, for gdb, drgn, readelf
    pagelens export DIR --to criu -o OUT     CRIU's memory images (pagemap, pages), for crit and lazy restore
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("source", type=Path, metavar="DIR", help="a checkpoint")
        parser.add_argument("--to", choices=CHECKPOINT_FORMATS, required=True, help="the format")
        parser.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help="what to write")
        parser.add_argument(
            "--with-files", action="store_true", help="core: also clean pages of mapped files"
        )
        parser.add_argument(
            "--parent", type=Path, metavar="OUT", help="criu: images that these are to build on"
        )
        parser.add_argument("--force", action="store_true", help="overwrite FILE")

    def run(self, args: argparse.Namespace) -> int:
        """Export."""
        from pagelens.checkpoint import core, criu
        from pagelens.checkpoint.look import is_checkpoint
        from pagelens.checkpoint.stored import Stored

        if not is_checkpoint(args.source):
            raise UsageError(f"{args.source} is no checkpoint")
        store = Stored.open(args.source)
        if args.to == "core":
            if args.parent is not None:
                raise UsageError("--parent is for --to criu")
            notes = core.export(store, args.output, with_files=args.with_files, force=args.force)
        else:
            if args.with_files or args.force:
                raise UsageError("--with-files and --force are for --to core")
            notes = criu.export(store, args.output, parent=args.parent)
        sys.stdout.write(f"{args.output}: written from {args.source}\n")
        for note in notes:
            sys.stderr.write(f"pagelens: {note}\n")
        return 0
