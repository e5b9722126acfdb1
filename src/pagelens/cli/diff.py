"""`pagelens diff`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from pagelens.cli import checkpoint_view, target
from pagelens.cli.output import add_output_arguments, emit_object
from pagelens.report.diff import Moment, compare
from pagelens.vm.errors import UsageError
from pagelens.vm.units import AddrRange


class Command:
    """What changed between two moments: smaps fields, vmas, pages, and the stores that did it.

    A and B: a process (now), a capture (its last snapshot), CAPTURE@exec or CAPTURE@exit. One capture alone:
    from its execve to its exit. One process alone: now and --in seconds later. Within one capture each
    changed page names its faults, with function, line and cause. Two different programs are compared region
    by region.

      $ pagelens diff out.plens --explain
      $ pagelens diff 4711 --in 2
      $ pagelens diff 4711 4712
      $ pagelens diff CHECKPOINT CHECKPOINT     contents, byte by byte; also CHECKPOINT PID
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("a", metavar="A", help="process id, or capture[@exec|@exit]")
        parser.add_argument("b", metavar="B", nargs="?", help="likewise")
        parser.add_argument(
            "--in", dest="later", type=float, metavar="S", help="a process: now and S seconds later"
        )
        parser.add_argument("--range", metavar="START-END", help="only this address range")
        parser.add_argument("--mm", type=int, metavar="N", help="captures: address space number")
        parser.add_argument(
            "--by", choices=("auto", "address", "region"), default="auto", help="how to compare"
        )
        parser.add_argument("--frames", action="store_true", help="processes: compare frames too (root)")
        parser.add_argument("--explain", action="store_true", help="what each field means, and why Rss stays")
        parser.add_argument("--pages", type=int, default=40, metavar="N", help="page runs to show (0: all)")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Take or load both sides, compare, print."""
        where = AddrRange.parse(args.range) if args.range else None
        if any(checkpoint_view.is_checkpoint(text) for text in (args.a, args.b or "")):
            checkpoint_view.diff(args)
        elif args.b is None and args.later is not None:
            _now_and_later(args, where)
        else:
            a, b, origin = _sides(args)
            _print(args, where, a, b, origin)
        return 0


def _print(
    args: argparse.Namespace, where: AddrRange | None, a: Moment, b: Moment, origin: tuple[Path, int] | None
) -> None:
    from pagelens.report import difftext

    diff = compare(a, b, where=where, by=args.by)
    if origin is not None:
        from pagelens.capture.reader import Capture
        from pagelens.report import stores

        stores.attribute(diff, Capture(origin[0]), origin[1])
    elif diff.pages:
        diff.notes.append(
            "stores are known within one recording: pagelens run or attach, then diff the capture"
        )
    limit = args.pages if args.pages > 0 else len(diff.pages)
    value = difftext.as_json(diff, pages=args.pages if args.pages != 40 else 0)
    emit_object(args, value, difftext.as_text(diff, explain=args.explain, pages=limit))


def _now_and_later(args: argparse.Namespace, where: AddrRange | None) -> None:
    # Recorded by attach, so that stores have names; without the privilege, two looks.
    from pagelens.capture.attach import attach
    from pagelens.capture.reader import Capture
    from pagelens.capture.session import Settings
    from pagelens.report import moments
    from pagelens.vm.errors import CapabilityMissingError

    pid = target.pid_only(args.a, "diff --in")
    seconds = max(0.0, args.later)
    if not args.frames:
        with tempfile.TemporaryDirectory(prefix="pagelens-diff-") as directory:
            path = Path(directory) / f"{pid}.plens"
            try:
                attach(path, Settings(), pid, duration=seconds)
            except CapabilityMissingError as error:
                sys.stderr.write(f"pagelens: not recorded, so stores stay unknown ({error})\n")
            else:
                capture = Capture(path)
                mm = moments.main_mm(capture)
                names = moments.ends(capture, mm)
                sides = [_recorded(path, name, mm)[0] for name in names]
                a, b = (
                    replace(side, name=f"{name} ({side.shot.method})")
                    for side, name in zip(sides, (f"process {pid} now", f"{seconds:g} s later"), strict=True)
                )
                _print(args, where, a, b, (path, mm))
                return
    before = _live(pid, f"process {pid} now", args.frames)
    time.sleep(seconds)
    _print(args, where, before, _live(pid, f"{seconds:g} s later", args.frames), None)


def _sides(args: argparse.Namespace) -> tuple[Moment, Moment, tuple[Path, int] | None]:
    # Both moments; and (capture, mm) where both are of one address space of one capture.
    if args.later is not None:
        raise UsageError("--in compares one process with itself: leave out B")
    if args.b is None:
        path = target.parse(args.a)
        if not isinstance(path, Path):
            raise UsageError(
                "diff of a process needs a second side: another process, a capture, or --in SECONDS"
            )
        from pagelens.capture.reader import Capture
        from pagelens.report import moments

        capture = Capture(path)
        mm = moments.main_mm(capture) if args.mm is None else args.mm
        one_end, other_end = moments.ends(capture, mm)
        return _recorded(path, one_end, mm)[0], _recorded(path, other_end, mm)[0], (path, mm)
    one, two = _side(args.a, args), _side(args.b, args)
    same = one[1] is not None and one[1] == two[1]
    return one[0], two[0], one[1] if same else None


def _side(text: str, args: argparse.Namespace) -> tuple[Moment, tuple[Path, int] | None]:
    name, _, moment = text.partition("@")
    what = target.parse(name)
    if isinstance(what, Path):
        found, mm = _recorded(what, moment or None, args.mm)
        return found, (what, mm)
    if moment:
        raise UsageError(f"@{moment} is for captures; {name} is a process")
    return _live(what, f"process {what}", args.frames), None


def _live(pid: int, name: str, frames: bool) -> Moment:
    from pagelens.linux import regions, snapshot
    from pagelens.linux.procfs import Process

    with Process.open(pid) as proc:
        shot = snapshot.take(proc, frames=frames)
        found, _ = regions.regions(proc, shot.vmas)
    return Moment(shot, found, f"{name} ({shot.method})")


def _recorded(path: Path, moment: str | None, mm: int | None) -> tuple[Moment, int]:
    from pagelens.capture.reader import Capture
    from pagelens.report import moments

    capture = Capture(path)
    chosen = mm if mm is not None else moments.main_mm(capture)
    shot, found, _ = moments.look(capture, chosen, moment)
    return Moment(
        shot, found, f"{moment or 'last snapshot'} of mm {chosen} in {path.name} ({shot.method})"
    ), chosen
