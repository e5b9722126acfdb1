"""`pagelens attach`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagelens.cli.recording import add_recording_arguments, print_summary, recording_settings
from pagelens.linux.procfs import Process
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError, UsageError
from pagelens.vm.units import PAGE_SIZE


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

        if args.duration is not None and args.duration < 0:
            raise UsageError("--duration must not be negative")
        settings = recording_settings(args)
        settings.method = args.method
        with Process.open(args.pid) as process:
            stat = process.stat()
            cost = _cost(process, args.tree, args.snapshot)
        capture = (
            Path(args.capture) if args.capture else Path(f"{stat.comm.replace('/', '_')}-{args.pid}.plens")
        )
        if not args.quiet:
            sys.stderr.write(f"pagelens: attaching to {args.pid} ({stat.comm}), {cost}\n")
        done = attach(capture, settings, args.pid, duration=args.duration, tree=args.tree, force=args.force)
        notes = [f"{done.tasks:,} tasks found in {done.passes} passes", *done.notes]
        print_summary(args, capture, done.summary, notes)
        return 0


# Measured: 0.17 s of CPU for one full snapshot of 2 GiB of 4 KiB pages (pagemap, smaps), while the process runs on.
_SNAPSHOT_SECONDS = 0.09  # a GiB
_LARGE = 256 << 20


def _cost(process: Process, tree: bool, snapshot: str) -> str:
    """What it will cost the target, in words."""
    from pagelens.linux.tree import descendants

    pids = descendants([process.pid]) if tree else [process.pid]
    threads = resident = 0
    for pid in pids:
        try:
            with Process.open(pid) as member:
                threads += len(member.tasks())
                resident += int(member.read("statm").split()[1]) * PAGE_SIZE
        except (TargetGoneError, CapabilityMissingError):
            continue
    text = f"{len(pids):,} processes, " if tree else ""
    text += f"{threads:,} thread{'' if threads == 1 else 's'}: about 0.5 \u00b5s a fault (normal)"
    text += ", 0.1 \u00b5s a system call"
    if snapshot == "full" and resident >= _LARGE:
        gib = resident / (1 << 30)
        text += f"; a snapshot of {gib:.1f} GiB at attach and detach, about {gib * _SNAPSHOT_SECONDS:.1f} s of CPU each"
        text += " (--snapshot maps: none)"
    return text
