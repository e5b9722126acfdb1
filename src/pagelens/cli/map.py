"""`pagelens map`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagelens.cli import checkpoint_view, target
from pagelens.cli.output import add_output_arguments, emit
from pagelens.cli.table import Col
from pagelens.vm.errors import UsageError
from pagelens.vm.regions import Region
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import AddrRange, format_size

COLUMNS = (
    Col("start", kind="addr"),
    Col("end", kind="addr"),
    Col("perms"),
    Col("size", kind="bytes"),
    Col("rss", kind="bytes"),
    Col("dirty", kind="bytes", spare=2),
    Col("swap", kind="bytes", spare=3),
    Col("kind", spare=1),
    Col("name"),
)
MORE = (
    Col("vma", kind="int", spare=4),
    Col("evidence", spare=4),
    Col("file", spare=5),
    Col("offset", kind="addr", spare=5),
    Col("flags", kind="list"),
)
CHANGES = (
    Col("at", kind="moment"),
    Col("event", kind="int"),
    Col("mm", kind="int", spare=1),
    Col("tid", kind="int", spare=1),
    Col("call"),
    Col("effect"),
    Col("gone", kind="list"),
    Col("came", kind="list"),
)


class Command:
    """The memory map of a process, named as a person would: heap, stack of thread N, guard, arena, library
    segment.

    A vma that holds two things (a stack merged with a malloc chunk) is shown as two rows with one number.
    rss counts present pages, dirty those modified and mapped only here (Private_Dirty of smaps).

      $ pagelens map 4711
      $ pagelens map 4711 --evidence --format json
      $ pagelens map out.plens --at 20ms
      $ pagelens map out.plens --changes
      $ pagelens map CHECKPOINT
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        target.add_target(parser, optional=True)
        parser.add_argument("range", nargs="?", metavar="START-END", help="only this address range")
        parser.add_argument(
            "--evidence", action="store_true", help="also what each name rests on, file, flags"
        )
        parser.add_argument("-c", "--capture", metavar="DIR", help="a capture")
        parser.add_argument("--at", metavar="WHEN", help="capture: exec, exit, time since start, or #EVENT")
        parser.add_argument("--changes", action="store_true", help="capture: each call that changed the map")
        parser.add_argument("--mm", type=int, metavar="N", help="capture: address space number")
        parser.add_argument("--vmas", action="store_true", help="the kernel's vmas as they are, no splitting")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Read, name, print."""
        what = target.chosen(args, "map")
        where = AddrRange.parse(args.range) if args.range else None
        if isinstance(what, Path) and checkpoint_view.is_checkpoint(what):
            if args.changes or args.at is not None or args.mm is not None:
                raise UsageError("--at, --changes and --mm are for captures; a checkpoint is one moment")
            shot, found, notes = checkpoint_view.look(what)
        elif isinstance(what, Path):
            from pagelens.capture.reader import Capture
            from pagelens.report import moments

            capture = Capture(what)
            if args.changes:
                changes, remarks = moments.change_rows(capture, args.mm)
                emit(args, CHANGES, changes, notes=[*remarks, *capture.missing])
                return 0
            shot, found, notes = moments.look(capture, args.mm, args.at)
        elif args.changes or args.at is not None or args.mm is not None:
            raise UsageError(
                "--at, --changes and --mm need a capture: record one with pagelens run or attach"
            )
        else:
            shot, found, notes = look(what, plain=args.vmas)
        rows = region_rows(shot, found, where)
        wide = args.evidence or args.format != "table"
        notes = [summary(shot, found), *notes]
        emit(args, (*COLUMNS, *MORE) if wide else COLUMNS, rows, notes=notes)
        return 0


def look(pid: int, *, plain: bool = False) -> tuple[Snapshot, list[Region], list[str]]:
    """Snapshot and regions of a live process, and notes on what could not be known."""
    from pagelens.linux import regions, snapshot
    from pagelens.linux.procfs import Process
    from pagelens.vm.regions import Evidence, name_regions

    with Process.open(pid) as proc:
        shot = snapshot.take(proc, pages=False)
        if plain:
            return shot, name_regions(shot.vmas, Evidence()), list(shot.notes)
        found, notes = regions.regions(proc, shot.vmas)
        split = any(a.vma == b.vma for a, b in itertools.pairwise(found))
        if split:  # page states tell how much of a shared vma each tenant has
            shot = snapshot.take(proc)
            found, notes = regions.regions(proc, shot.vmas)
    return shot, found, [*shot.notes, *notes]


def region_rows(
    shot: Snapshot, found: Sequence[Region], where: AddrRange | None = None
) -> list[dict[str, Any]]:
    """Rows for `emit`. Sizes of a vma with several tenants come from its pages (dirty is unknown then)."""
    account = shot.accounting
    per_vma: dict[str, list[int]] = {}
    if account is not None and account.per_vma is not None:
        for name, field in (("rss", "Rss"), ("dirty", "Private_Dirty"), ("swap", "Swap")):
            if field in account.fields:
                per_vma[name] = account.column(field).tolist()
    shared = {a.vma for a, b in itertools.pairwise(found) if a.vma == b.vma}
    rows = []
    for region in found:
        if where is not None and (region.end <= where.start or region.start >= where.end):
            continue
        vma = shot.vmas[region.vma]
        if region.vma in shared:
            sizes = _sizes_by_pages(shot, region)
        else:
            sizes = {name: column[region.vma] for name, column in per_vma.items()}
        rows.append(
            {
                "start": region.start,
                "end": region.end,
                "perms": vma.perms,
                "size": region.end - region.start,
                **sizes,
                "kind": str(region.kind),
                "name": region.label,
                "vma": region.vma,
                "evidence": region.evidence,
                "file": vma.name or None,
                "offset": vma.offset + region.start - vma.start if vma.inode else None,
                "flags": None if vma.vm_flags is None else sorted(vma.vm_flags),
            }
        )
    return rows


def _sizes_by_pages(shot: Snapshot, region: Region) -> dict[str, int | None]:
    from pagelens.vm.pages import PageState

    if shot.pages is None:
        return {"rss": None, "dirty": None, "swap": None}
    here = shot.pages.clipped(region.start, region.end)
    return {
        "rss": here.count_where(PageState.PRESENT, PageState.ZERO) << 12,
        "dirty": None,
        "swap": here.count_where(PageState.SWAPPED) << 12,
    }


def summary(shot: Snapshot, found: Sequence[Region]) -> str:
    """The line below the table."""
    total = shot.accounting.total if shot.accounting is not None else {}
    shared = len(found) - len(shot.vmas)
    text = f"{len(shot.vmas)} vmas"
    if shared:
        text += f" ({shared} of them seen as more than one)" if shared == 1 else f" in {len(found)} rows"
    mapped = format_size(shot.vmas.pages << 12)
    resident = format_size(total["Rss"]) + " resident" if "Rss" in total else "residency not known"
    still = "complete" if shot.complete else "incomplete"
    return f"{text}, {mapped} mapped, {resident}; {shot.method}; {still}"
