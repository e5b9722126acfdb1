"""`pagelens pages`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.cli import checkpoint_view, target
from pagelens.cli.output import add_output_arguments, emit
from pagelens.cli.table import Col
from pagelens.inspect import uncounted
from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.vm.errors import UsageError
from pagelens.vm.names import page_flag_names
from pagelens.vm.pages import PageRuns, PageState
from pagelens.vm.regions import Region
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import AddrRange

RUNS = (
    Col("start", kind="addr"),
    Col("end", kind="addr"),
    Col("pages", kind="int"),
    Col("state", kind="list"),
)
FRAMES = (Col("pfn", kind="int"), Col("mapcount", kind="int"), Col("flags", kind="list"), Col("why"))
WHERE = (Col("kind", spare=1), Col("name"))
COUNTS = (
    Col("start", kind="addr"),
    Col("end", kind="addr"),
    Col("pages", kind="int"),
    *(
        Col(n, kind="int")
        for n in ("present", "absent", "swapped", "zero", "huge", "exclusive", "file", "guard")
    ),
    *WHERE,
)
_STATES = {state.name.lower().replace("_", "-"): state for state in PageState if state.name and state}


class Command:
    """State of the pages of a process: present, swapped, zero, huge, exclusive, file, guard, written.

    Runs of equal state; a page that is not listed has no page-table entry. --by region counts instead.
    --frames adds frame number, map count and frame flags (root), one row for each run of frames.

      $ pagelens pages 4711 --by region
      $ pagelens pages 4711 7f0000000000-7f0000200000 --frames
      $ pagelens pages 4711 --state present,!file
      $ pagelens pages out.plens --at exec
      $ pagelens pages CHECKPOINT --by region
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        target.add_target(parser, optional=True)
        parser.add_argument("range", nargs="?", metavar="START-END", help="only this range (also START+SIZE)")
        parser.add_argument(
            "--frames", action="store_true", help="frame number, map count, frame flags (root)"
        )
        parser.add_argument("-c", "--capture", metavar="DIR", help="a capture")
        parser.add_argument(
            "--at", metavar="WHEN", help="capture: exec, exit, attach or detach (default: the last)"
        )
        parser.add_argument("--mm", type=int, metavar="N", help="capture: address space number")
        parser.add_argument("--mapcount", type=int, metavar="N", help="only frames mapped N times (--frames)")
        parser.add_argument(
            "--state", metavar="S,!S", help=f"only pages with these states: {', '.join(_STATES)}; ! excludes"
        )
        parser.add_argument("--by", choices=("run", "region"), default="run", help="rows (default: run)")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Read, filter, print."""
        if args.mapcount is not None:
            args.frames = True
        if args.frames and args.by == "region":
            raise UsageError("--frames lists runs of frames; leave out --by region")
        bits, without = parse_states(args.state)
        notes: Sequence[str] = ()
        what = target.chosen(args, "pages")
        where = AddrRange.parse(args.range) if args.range else None
        if isinstance(what, Path) and checkpoint_view.is_checkpoint(what):
            if args.frames or args.at is not None or args.mm is not None:
                raise UsageError("a checkpoint is one moment without frames: leave out --frames, --at, --mm")
            shot, found, _ = checkpoint_view.look(what)
        elif isinstance(what, Path):
            shot, found, notes = _recorded(what, args)
        elif args.at is not None or args.mm is not None:
            raise UsageError("--at and --mm need a capture: record one with pagelens run or attach")
        else:
            shot, found, notes = _live(what, args.frames, where)
        if where is not None and not shot.vmas.overlapping(where.start, where.end):
            raise UsageError(f"nothing is mapped in {where}")
        runs = shot.pages if shot.pages is not None else PageRuns.empty()
        if where is not None:
            runs = runs.clipped(where.start, where.end)
        if bits or without:
            runs = runs.where(bits, without)
        notes = (
            f"{runs.pages:,} pages in {len(runs):,} runs; {shot.method}; "
            f"{'complete' if shot.complete else 'incomplete'}",
            *shot.notes,
            *notes,
        )
        if args.by == "region":
            emit(args, COUNTS, count_rows(runs, found, where), notes=notes)
        elif args.frames:
            emit(args, (*RUNS, *FRAMES, *WHERE), frame_rows(shot, runs, found, args.mapcount), notes=notes)
        else:
            emit(args, (*RUNS, *WHERE), run_rows(runs, found), notes=notes)
        return 0


def _live(pid: int, frames: bool, where: AddrRange | None) -> tuple[Snapshot, list[Region], Sequence[str]]:
    with Process.open(pid) as proc:
        # VmFlags (from smaps) tell why a frame has no count; without frames maps is enough.
        shot = snapshot.take(proc, accounting=frames, frames=frames, within=where)
        found, notes = regions.regions(proc, shot.vmas)
    return shot, found, notes


def _recorded(path: Path, args: argparse.Namespace) -> tuple[Snapshot, list[Region], Sequence[str]]:
    from pagelens.capture.reader import Capture
    from pagelens.report import moments

    if args.at is not None and args.at not in moments.MOMENTS:
        raise UsageError(
            f"pages are known at snapshots only: --at {', '.join(moments.MOMENTS)}, not {args.at!r}"
        )
    shot, found, _ = moments.look(Capture(path), args.mm, args.at)
    if shot.pages is None:
        raise UsageError("the capture has no page states (it was recorded with --snapshot none or maps)")
    if args.frames and shot.pages.pfn is None:
        raise UsageError("frame numbers are not recorded in a capture; ask a process (pages PID --frames)")
    return shot, found, ()


def parse_states(text: str | None) -> tuple[PageState, PageState]:
    """(wanted, excluded) of "present,!file"."""
    wanted = excluded = PageState.NONE
    for word in (text or "").split(","):
        name = word.strip().lower()
        if not name:
            continue
        bit = _STATES.get(name.lstrip("!"))
        if bit is None:
            raise UsageError(f"no page state {word!r} (known: {', '.join(_STATES)})")
        if name.startswith("!"):
            excluded |= bit
        else:
            wanted |= bit
    return wanted, excluded


def state_names(state: int) -> list[str]:
    """["present", "exclusive"]."""
    return [name for name, bit in _STATES.items() if state & bit]


def run_rows(runs: PageRuns, found: list[Region]) -> list[dict[str, Any]]:
    """One row for each run, cut where a region ends."""
    return [
        {"start": s, "end": s + (n << 12), "pages": n, "state": state_names(state), **_place(region)}
        for s, n, state, region in _cut(runs, found)
    ]


def count_rows(runs: PageRuns, found: list[Region], where: AddrRange | None) -> list[dict[str, Any]]:
    """One row for each region with pages of each state."""
    rows = []
    for region in found:
        start, end = region.start, region.end
        if where is not None:
            start, end = max(start, where.start), min(end, where.end)
            if start >= end:
                continue
        here = runs.clipped(start, end)
        pages = (end - start) >> 12
        counts = {
            name: here.count_where(_STATES[name])
            for name in ("present", "swapped", "zero", "huge", "exclusive", "file", "guard")
        }
        rows.append(
            {
                "start": start,
                "end": end,
                "pages": pages,
                "absent": pages - here.pages,
                **counts,
                **_place(region),
            }
        )
    return rows


def frame_rows(
    shot: Snapshot, runs: PageRuns, found: list[Region], mapcount: int | None
) -> list[dict[str, Any]]:
    """Runs of consecutive frames with equal state, map count and flags; `why` where a present page has no
    count."""
    if runs.pfn is None or runs.mapcount is None or runs.kflags is None or not runs.pages:
        return []
    addr, state, pfn = runs.addresses(), runs.states(), runs.pfn
    one = np.uint64(1)
    step = np.diff(pfn) != one
    # Pages that share one frame (the zero page) or have none run on as well.
    step &= np.diff(pfn) != 0
    same = (np.diff(addr) == 4096) & (np.diff(state) == 0) & ~step
    same &= (np.diff(runs.mapcount) == 0) & (runs.kflags[1:] == runs.kflags[:-1])
    first = np.concatenate(([0], np.flatnonzero(~same) + 1))
    count = np.diff(np.concatenate((first, [len(addr)])))
    if mapcount is not None:
        keep = runs.mapcount[first] == mapcount
        first, count = first[keep], count[keep]
    cut = PageRuns(addr[first], count.astype(np.uint64), state[first])
    info = {int(addr[i]): i for i in first.tolist()}
    rows = []
    index = 0
    for s, n, bits, region in _cut(cut, found):
        index = info.get(s, index)
        frame, count_, flags = int(pfn[index]), int(runs.mapcount[index]), int(runs.kflags[index])
        why = None
        if frame and count_ <= 0 and region is not None:
            why, _, _ = uncounted.classify(PageState(bits), flags, count_, shot.vmas[region.vma])
        rows.append(
            {
                "start": s,
                "end": s + (n << 12),
                "pages": n,
                "state": state_names(bits),
                "pfn": frame or None,
                "mapcount": None if count_ < 0 else count_,
                "flags": page_flag_names(flags),
                "why": why,
                **_place(region),
            }
        )
    return rows


def _place(region: Region | None) -> dict[str, Any]:
    return {"kind": str(region.kind), "name": region.label} if region else {"kind": None, "name": None}


def _cut(runs: PageRuns, found: list[Region]) -> list[tuple[int, int, int, Region | None]]:
    # (start, pages, state, region), runs cut at region boundaries.
    out: list[tuple[int, int, int, Region | None]] = []
    i = 0
    for start, count, state in zip(
        runs.start.tolist(), runs.count.tolist(), runs.state.tolist(), strict=True
    ):
        at, end = start, start + (count << 12)
        while at < end:
            while i < len(found) and found[i].end <= at:
                i += 1
            region = found[i] if i < len(found) and found[i].start <= at else None
            limit = region.end if region else (found[i].start if i < len(found) else end)
            stop = min(end, limit)
            out.append((at, (stop - at) >> 12, state, region))
            at = stop
    return out
