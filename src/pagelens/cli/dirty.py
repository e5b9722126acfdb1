"""`pagelens dirty`: thin; `pagelens.dirty` does the work."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagelens.cli.output import add_output_arguments, emit, terminal_width, use_color, write_file
from pagelens.cli.table import Col, render_table
from pagelens.vm.errors import TargetGoneError, UsageError
from pagelens.vm.units import PAGE_SIZE, AddrRange, format_size, parse_size

if TYPE_CHECKING:
    from pagelens.dirty.content import Contents
    from pagelens.dirty.epoch import Epoch
    from pagelens.dirty.track import Tracker


class Command:
    """Pages that a process writes, epoch by epoch: how many, where, how fast, how sure.

    pagelens dirty PID                     one line a second, until it ends or ^C
    pagelens dirty --count 5 --interval 0.2 --ranges --format json PID
    pagelens dirty -- CMD [ARG …]          every page that CMD writes during its run; ends as CMD ends
    pagelens dirty --forecast 1G,10ms PID  would iterative pre-copy converge?

    The process is asked for one system call (userfaultfd) and left alone; when pagelens ends, however it
    ends, nothing of the tracking remains. `--backend` names another way (see docs/dirty.md for what each may
    list too much or miss). JSON: one object a line and epoch (docs/schemas/dirty.json), and the forecast last
    (docs/schemas/dirty-forecast.json).
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.usage = "pagelens dirty [OPTION …] PID | -- CMD [ARG …]"
        parser.add_argument(
            "target", nargs="*", metavar="PID | CMD", help="a process id, or -- and a command"
        )
        parser.add_argument(
            "--interval",
            type=float,
            metavar="S",
            help="seconds an epoch (default: 1; --forecast: the pause; CMD: its run, with --follow 0.05)",
        )
        parser.add_argument("--count", type=int, metavar="N", help="end after N epochs")
        parser.add_argument(
            "--backend", default="auto", help="auto, pagescan, soft-dirty, all (default: auto)"
        )
        parser.add_argument("--range", action="append", metavar="START-END", help="only these addresses")
        parser.add_argument("--ranges", action="store_true", help="list the address ranges of the pages")
        parser.add_argument("--oneline", action="store_true", help="one line an epoch, memory as a strip")
        parser.add_argument("--heat", action="store_true", help="at the end, a heat map: addresses by epochs")
        parser.add_argument("--content", action="store_true", help="tell pages rewritten with the same bytes")
        parser.add_argument("--follow", action="store_true", help="the children too")
        parser.add_argument("--keep-huge", action="store_true", help="leave huge pages unarmed and unsplit")
        parser.add_argument(
            "--forecast",
            metavar="BANDWIDTH,PAUSE",
            help="pre-copy forecast: bytes a second, longest pause, as 1G,10ms",
        )
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Do it."""
        _check(args)
        plan = parse_forecast(args.forecast) if args.forecast else None
        pid = _pid_of(args)
        return _Session(args, plan).run_command() if pid is None else _Session(args, plan).run_pid(pid)


def _check(args: argparse.Namespace) -> None:
    if not args.target:
        raise UsageError("name a process id, or a command behind --")
    if args.interval is not None and args.interval <= 0:
        raise UsageError("--interval must be positive")
    if args.count is not None and args.count <= 0:
        raise UsageError("--count must be positive")
    if args.format == "parquet" and not args.output:
        raise UsageError("--format parquet needs -o FILE")
    if args.output and Path(args.output).exists() and not args.force:
        raise UsageError(f"{args.output} exists; --force overwrites it")


def _pid_of(args: argparse.Namespace) -> int | None:
    # One number is a process; anything else is a command (argparse has swallowed the `--`).
    if len(args.target) == 1 and args.target[0].isdigit():
        return int(args.target[0])
    return None


def parse_forecast(text: str) -> tuple[float, float]:
    """(bytes a second, seconds) of "1G,10ms"."""
    first, found, second = text.partition(",")
    scale = {"ms": 1e-3, "us": 1e-6, "s": 1.0}
    for unit, factor in scale.items():
        if found and second.endswith(unit):
            with contextlib.suppress(ValueError):
                return float(parse_size(first)), float(second[: -len(unit)]) * factor
    raise UsageError(f"not a forecast: {text!r} (example: 1G,10ms)")


class _Session:
    # One run of the command: takes epochs, prints them as they come, and the closing views.
    def __init__(self, args: argparse.Namespace, plan: tuple[float, float] | None) -> None:
        self.args = args
        self.plan = plan
        self.epochs: list[Epoch] = []
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.contents: dict[int, Contents] = {}
        self.keep = bool(args.heat or plan) or args.format == "table"

    def make(self, pid: int, *, traced: bool = False, new: bool = False) -> Tracker:
        from pagelens.dirty.choose import make_backend
        from pagelens.dirty.spans import of
        from pagelens.dirty.track import Tracker
        from pagelens.linux.procfs import Process

        ranges = [AddrRange.parse(text) for text in self.args.range or ()]
        where = of((r.start, r.end) for r in ranges) if ranges else None
        proc = Process.open(pid)
        try:
            tracker = Tracker(
                proc,
                lambda p: make_backend(
                    self.args.backend, p, ranges=where, keep_huge=self.args.keep_huge, traced=traced
                ),
            )
        except BaseException:
            proc.close()
            raise
        if new:
            tracker.list_everything()
        return tracker

    def run_pid(self, pid: int) -> int:
        if pid == os.getpid():
            raise UsageError("that is pagelens itself; pagelens.track() watches its own process")
        tracker = self.make(pid)
        # A forecast is about rounds as short as the pause: epochs of a second would only be stretched to it.
        interval = self.args.interval or (min(1.0, max(0.01, self.plan[1])) if self.plan else 1.0)
        ended = False
        with self._watching(tracker) as looks:
            try:
                for epochs in _paced(looks, interval, self.args.count):
                    for epoch in epochs:
                        self.show(epoch)
            except TargetGoneError as error:
                sys.stderr.write(f"pagelens: {error}\n")
                ended = True
            except KeyboardInterrupt:
                pass
        self.finish()
        return TargetGoneError.exit_code if ended and (self.args.count is not None or not self.rows) else 0

    @contextlib.contextmanager
    def _watching(self, tracker: Tracker) -> Iterator[Any]:
        from pagelens.dirty.follow import Family

        if self.args.content:
            self._remember(tracker)
        if not self.args.follow:
            with tracker:
                yield lambda: [tracker.epoch()]
            return
        family = Family(tracker.pid, lambda pid: self.make(pid, new=True), tracker)
        try:
            yield family.looks
        finally:
            family.close()
            for why in family.refused.values():
                sys.stderr.write(f"pagelens: a child is not watched: {why}\n")

    def run_command(self) -> int:
        from pagelens.dirty.command import CommandRun

        run = CommandRun(
            self.args.target,
            lambda pid: self.make(pid, traced=True),
            # A child is found by a look, so there must be some.
            self.args.interval or (0.05 if self.args.follow else None),
            (lambda pid: self.make(pid, new=True)) if self.args.follow else None,
        )
        with _ignored(signal.SIGINT, signal.SIGQUIT):  # the terminal sends them to the program too
            left = self.args.count
            for epoch in run:
                self.show(epoch)
                if left is not None:
                    left -= 1
                    if left == 0:
                        run.stop_tracking()
                        break
            status = run.wait()
        self.finish()
        if os.WIFSIGNALED(status):
            sys.stdout.flush()
            _die_as(os.WTERMSIG(status))
        return os.waitstatus_to_exitcode(status)

    def _remember(self, tracker: Tracker) -> None:
        from pagelens.dirty.content import Contents

        self.contents[tracker.pid] = Contents(tracker.pid)
        self.contents[tracker.pid].remember(tracker.contents())

    def show(self, epoch: Epoch) -> None:
        same = None
        if self.args.content:
            from pagelens.dirty.content import Contents

            same = self.contents.setdefault(epoch.pid, Contents(epoch.pid)).unchanged(epoch)
        from pagelens.report.dirty import describe, record

        row = record(epoch, ranges=self.args.ranges, same=same)
        if self.keep:
            self.epochs.append(epoch)
        self.rows.append(row)
        if self.args.format == "json":
            self._line(json.dumps(row))
        elif self.args.format != "table":
            return
        elif self.args.oneline:
            from pagelens.dirty.heat import strip

            self._line(f"{epoch.epoch:>5} {epoch.dirty_pages:>9,} |{strip(epoch)}|")
        else:
            self._line(describe(epoch, same))
            if self.args.ranges:
                for start, pages in epoch.ranges():
                    self._line(f"      {start:012x} {pages:>8,}")

    def _line(self, text: str) -> None:
        self.lines.append(text)
        if not self.args.output:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def finish(self) -> None:
        args = self.args
        if args.format in ("csv", "parquet"):
            flat = [r | {"reasons": [f"{k}={v}" for k, v in r["reasons"].items()]} for r in self.rows]
            columns = _COLUMNS
            if args.ranges:
                columns = [*columns, Col("ranges", kind="list")]
                flat = [r | {"ranges": [f"{start}+{pages}" for start, pages in r["ranges"]]} for r in flat]
            emit(args, columns, flat)
            return
        if args.format == "table":
            for line in self._closing():
                self._line(line)
        elif self.plan and self.epochs:
            self._line(json.dumps({"forecast": self._forecast()}))
        if args.output:
            write_file(Path(args.output), ("\n".join(self.lines) + "\n").encode(), args.force)

    def _forecast(self) -> dict[str, Any]:
        from pagelens.dirty import forecast, spans

        assert self.plan is not None
        epochs = [e for e in self.epochs if e.pid == self.epochs[0].pid]
        writable = spans.of((v.start, v.end) for v in epochs[-1].vmas if "w" in v.perms)
        total = epochs[-1].details.get("content_pages", writable.pages)
        cost = [e.cost_ns / 1e9 for e in epochs]
        curve = forecast.curve([e.spans for e in epochs], [e.span_ns / 1e9 for e in epochs], int(total), cost)
        return forecast.as_dict(curve, forecast.forecast(curve, *self.plan))

    def _closing(self) -> list[str]:
        if not self.epochs:
            return []
        out: list[str] = []
        if not self.args.oneline:
            out += self._totals()
        if self.args.heat:
            from pagelens.dirty.heat import table

            out += table([e for e in self.epochs if e.pid == self.epochs[0].pid])
        if self.plan:
            out.append(self._forecast()["text"])
        return out

    def _totals(self) -> list[str]:
        from pagelens.dirty import spans
        from pagelens.report.dirty import hottest

        each: dict[int, list[Epoch]] = {}
        for epoch in self.epochs:
            each.setdefault(epoch.pid, []).append(epoch)
        pages, rows = 0, []
        for pid, epochs in each.items():  # one address space each
            union = spans.EMPTY
            for epoch in epochs:
                union = spans.union(union, epoch.spans)
            pages += union.pages
            rows += [
                {"pid": pid, "start": r.start, "end": r.end, "perms": r.perms, "name": r.name or "anonymous",
                 "pages": r.pages, "dirty": r.dirty_pages, "share": r.dirty_pages / r.pages}
                for r in hottest(epochs)[:12]
            ]  # fmt: skip
        rows = sorted(rows, key=lambda row: -int(str(row["dirty"])))[:12]
        first = each[self.epochs[0].pid]
        span = sum(e.span_ns for e in first) / 1e9
        cost = sum(e.cost_ns for e in self.epochs) / 1e9
        text = (
            f"working set: {pages:,} pages ({format_size(pages * PAGE_SIZE)}) written in"
            f" {span:.3g} s over {len(self.epochs)} epochs; looking took {cost * 1e3:.3g} ms"
        )
        color, width = use_color(self.args), terminal_width(self.args)
        shown = render_table(_REGIONS, rows, title="Hottest regions", color=color, width=width)
        complete = all(e.complete for e in self.epochs)
        notes = list(dict.fromkeys(n for e in self.epochs for n in e.notes))[:8]
        method = f"method: {self.epochs[-1].backend}; complete: {'yes' if complete else 'no'}"
        return [text, *shown.rstrip("\n").splitlines(), method, *(f"note: {n}" for n in notes)]


_REGIONS = [
    Col("pid", kind="str"),
    Col("start", kind="addr"),
    Col("end", kind="addr"),
    Col("perms", spare=1),
    Col("pages", kind="int"),
    Col("dirty", "dirty pages", kind="int"),
    Col("share", "of it", kind="share"),
    Col("name"),
]
_COLUMNS = [
    Col("epoch", kind="int"),
    Col("pid", kind="int"),
    Col("time_ns", kind="int"),
    Col("span_ns", kind="int"),
    Col("cost_ns", kind="int"),
    Col("backend"),
    Col("dirty_pages", kind="int"),
    Col("bytes_per_s", kind="float"),
    Col("unmapped_pages", kind="int"),
    Col("same_content", kind="int"),
    Col("reasons", kind="list"),
    Col("complete", kind="bool"),
    Col("notes", kind="list"),
]


def _paced(look: Any, interval: float, count: int | None) -> Iterator[list[Epoch]]:
    due = time.monotonic()
    while count is None or count > 0:
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        yield look()
        if count is not None:
            count -= 1


@contextlib.contextmanager
def _ignored(*numbers: signal.Signals) -> Iterator[None]:
    before = {n: signal.signal(n, signal.SIG_IGN) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_as(number: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # SIGKILL needs no default
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
