"""`pagelens attach`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagelens.cli.recording import add_recording_arguments, print_summary, recording_settings
from pagelens.vm.errors import UsageError


class Command:
    """Record a process that runs already, and all that it starts from now on.

    Nothing is put into the process: no ptrace, no signal. Ends when the process ends, after --duration, or with
    Ctrl-C; then the process goes on as if nothing had been. Needs BPF (see: pagelens doctor).

      pagelens attach 1234 --duration 10
      pagelens attach 1234 --tree -c server.plens
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("pid", type=int, metavar="PID", help="the process")
        parser.add_argument("--duration", type=float, metavar="S", help="seconds (default: until it ends)")
        parser.add_argument("--tree", action="store_true", help="also the processes that it has started")
        parser.add_argument(
            "--method",
            choices=("auto", "bpf", "perf"),
            default="auto",
            help="bpf: everything, needs root; perf: own processes, user mode; auto: bpf, else perf",
        )
        add_recording_arguments(parser, "at attach and detach")

    def run(self, args: argparse.Namespace) -> int:
        """Exit code 0, also for a lossy recording: the verdict is in `status`."""
        from pagelens.capture.attach import attach
        from pagelens.linux.procfs import Process

        if args.duration is not None and args.duration < 0:
            raise UsageError("--duration must not be negative")
        settings = recording_settings(args)
        settings.method = args.method
        with Process.open(args.pid) as process:
            stat = process.stat()
            cost = f"{len(process.tasks()):,} threads"
        capture = (
            Path(args.capture) if args.capture else Path(f"{stat.comm.replace('/', '_')}-{args.pid}.plens")
        )
        if not args.quiet:
            sys.stderr.write(
                f"pagelens: attaching to {args.pid} ({stat.comm}), {cost}: about 0.5 \u00b5s a fault"
                " (normal), 0.1 \u00b5s a system call\n"
            )
        done = attach(capture, settings, args.pid, duration=args.duration, tree=args.tree, force=args.force)
        notes = [f"{done.tasks:,} tasks found in {done.passes} passes", *done.notes]
        print_summary(args, capture, done.summary, notes)
        return 0
