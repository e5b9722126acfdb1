"""pagelens rollback."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pagelens.cli.output import add_output_arguments, emit_object
from pagelens.cli.table import format_ns
from pagelens.vm.errors import UsageError


class Command:
    """Put a process back, in place, to a checkpoint of it.

    Memory map, contents and registers return to what they were; pages that are the same are not touched. What
    memory alone cannot bring back (file offsets, descriptors, threads and children that began or ended,
    signals that were delivered) is found before anything is touched, and refused unless accepted by
    --accept.
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        from pagelens.checkpoint.concerns import KINDS

        parser.add_argument("pid", type=int)
        parser.add_argument("checkpoint", type=Path, metavar="DIR")
        parser.add_argument(
            "--accept",
            default="",
            metavar="KIND,…",
            help="report these rather than refuse: all, " + ", ".join(KINDS),
        )
        parser.add_argument("--dry-run", action="store_true", help="only say whether it could be done")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Roll back."""
        from pagelens.checkpoint.concerns import KINDS
        from pagelens.checkpoint.rollback import rollback
        from pagelens.checkpoint.stored import Stored

        if args.pid == os.getpid():
            raise UsageError("pagelens cannot roll itself back")
        accept = [kind for kind in args.accept.split(",") if kind]
        if accept == ["all"]:
            accept = list(KINDS)
        done = rollback(args.pid, Stored.open(args.checkpoint), accept=accept, dry_run=args.dry_run)
        value = {
            "pid": args.pid,
            "checkpoint": str(args.checkpoint),
            "dry_run": args.dry_run,
            "compared_pages": done.compared_pages,
            "written_pages": done.written_pages,
            "dropped_pages": done.dropped_pages,
            "vma_calls": done.vma_calls,
            "threads": done.threads,
            "stopped_ns": done.stopped_ns,
            "accepted": list(done.accepted),
            "notes": list(done.notes),
        }
        if args.dry_run:
            text = f"process {args.pid} can be rolled back to {args.checkpoint}\n"
        else:
            text = (
                f"process {args.pid}: {done.written_pages:,} of {done.compared_pages:,} pages written, "
                f"{done.dropped_pages:,} dropped, {done.vma_calls} calls, {done.threads} threads; "
                f"stopped {format_ns(done.stopped_ns)}\n"
            )
        text += "".join(f"  accepted: {line}\n" for line in done.accepted)
        text += "".join(f"  note: {line}\n" for line in done.notes)
        emit_object(args, value, text)
        return 0
