"""pagelens checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pagelens.cli.output import add_output_arguments, write_text
from pagelens.cli.table import format_ns
from pagelens.vm.errors import UsageError
from pagelens.vm.units import AddrRange, format_size


class Command:
    """Save the memory and the threads of a process, at one instant.

    All threads are held while their registers are read and their pages are copied (milliseconds), then the
    process goes on; the rest is done beside it. Clean pages of mapped files are referred to, not copied.

      pagelens checkpoint 1234 -o full
      pagelens checkpoint 1234 -o second --parent full        only what has changed
      pagelens checkpoint 1234 -o chain --every 5 --keep 10   chain/000000, chain/000001, …
      pagelens checkpoint 1234 7f0000000000-7f0000100000 -o part
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("pid", type=int, help="process to save")
        parser.add_argument(
            "range",
            nargs="?",
            type=AddrRange.parse,
            help="only START-END (hexadecimal) or START+SIZE (64k, 0x1000)",
        )
        parser.add_argument("--parent", type=Path, metavar="DIR", help="store only what differs from DIR")
        parser.add_argument(
            "--every", type=float, metavar="S", help="a chain: one checkpoint every S seconds"
        )
        parser.add_argument(
            "--keep", type=int, default=0, metavar="N", help="of a chain, the newest N (0: all)"
        )
        parser.add_argument(
            "--count", type=int, default=0, metavar="N", help="stop a chain after N (0: never)"
        )
        parser.add_argument(
            "--with-files", action="store_true", help="also store clean pages of mapped files"
        )
        parser.add_argument(
            "--dedup",
            action="extend",
            nargs="*",
            type=Path,
            metavar="DIR",
            help="share pages of equal contents: within this checkpoint, its chain, and checkpoints DIR",
        )
        parser.add_argument(
            "--zstd", type=int, default=1, metavar="LEVEL", help="0: not compressed (default 1)"
        )
        parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="for all threads to stop")
        add_output_arguments(parser)
        for action in parser._actions:
            if action.dest == "output":
                action.metavar, action.help = "DIR", "the checkpoint to write (with --every: of all of them)"

    def run(self, args: argparse.Namespace) -> int:
        """Dump, or run a chain."""
        from pagelens.checkpoint.dump import dump

        if not args.output:
            raise UsageError("where to? give -o DIR")
        out = Path(args.output)
        args.output = None  # the rest of the output goes to stdout
        if not 0 <= args.zstd <= 22:
            raise UsageError(f"--zstd takes 0 (not compressed) to 22, not {args.zstd}")
        if args.every is not None:
            return self._chain(args, out)
        if args.keep or args.count:
            raise UsageError("--keep and --count are of a chain: give --every S")
        done = dump(
            args.pid,
            out,
            within=args.range,
            parent=args.parent,
            with_files=args.with_files,
            dedup=None if args.dedup is None else tuple(args.dedup),
            level=args.zstd,
            force=args.force,
            timeout=args.timeout,
        )
        report(args, done)
        return 0

    def _chain(self, args: argparse.Namespace, out: Path) -> int:
        from pagelens.checkpoint.incremental import Chain

        if args.parent is not None or args.range is not None:
            raise UsageError("--every makes its own chain of whole checkpoints; without --parent and a range")
        if args.dedup is not None or args.force:
            raise UsageError("--dedup and --force do not go with --every")
        if args.every < 0 or args.keep < 0 or args.count < 0:
            raise UsageError("--every, --keep and --count cannot be negative")
        with Chain(args.pid, out, keep=args.keep, level=args.zstd, with_files=args.with_files) as chain:
            for note in chain.notes:
                sys.stderr.write(f"pagelens: {note}\n")
            try:
                for done in chain.run(args.every, args.count):
                    report(args, done)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                return 0
        return 0


def report(args: argparse.Namespace, done: Any) -> None:
    """One line (table) or one JSON object a checkpoint."""
    import json

    fields: dict[str, Any] = {
        "path": str(done.path),
        "id": done.id,
        "pages": done.pages,
        "captured_pages": done.captured_pages,
        "stored_pages": done.stored_pages,
        "reused_pages": done.reused_pages,
        "zero_pages": done.zero_pages,
        "file_pages": done.file_pages,
        "stored_bytes": done.stored_bytes,
        "stopped_ns": done.stopped_ns,
        "total_ns": done.total_ns,
        "method": done.method,
        "complete": done.complete,
        "notes": list(done.notes),
    }
    if args.format == "json":
        write_text(args, json.dumps(fields) + "\n")
        return
    if args.format != "table":
        from pagelens.cli.output import emit
        from pagelens.cli.table import Col

        kinds = {str: "str", int: "int", bool: "bool", list: "list"}
        emit(args, [Col(name, kind=kinds[type(value)]) for name, value in fields.items()], [fields])
        return
    text = (
        f"{done.path}: {done.pages:,} pages ({done.zero_pages:,} zero, {done.reused_pages:,} from its "
        f"parents, {done.stored_pages:,} stored in {format_size(done.stored_bytes)}), {done.file_pages:,} of "
        f"files by reference; stopped {format_ns(done.stopped_ns)}, in all {format_ns(done.total_ns)}\n"
        f"  method: {done.method}; {'complete' if done.complete else 'INCOMPLETE'}\n"
    )
    write_text(args, text + "".join(f"  note: {note}\n" for note in done.notes))


__all__ = ["Command", "report"]
