"""What `map`, `pages` and `diff` show of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.cli.output import emit
from pagelens.cli.table import Col
from pagelens.vm.errors import UsageError
from pagelens.vm.regions import Region
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import PAGE_SIZE

DIFF = (
    Col("start", kind="addr"),
    Col("end", kind="addr"),
    Col("perms", spare=3),
    Col("kind", spare=4),
    Col("name"),
    Col("pages", "pages differ", "int"),
    Col("bytes", "bytes differ", "int"),
    Col("only_first", kind="int"),
    Col("only_second", kind="int"),
    Col("symbols", kind="list", spare=1),
    Col("runs", "at", "list", spare=2),
)
_MOST_SYMBOLS = 8


def is_checkpoint(path: str | Path) -> bool:
    """Whether it is the directory of a checkpoint (and not of a capture)."""
    return (Path(path) / "pages.pack").is_file()


def look(path: Path) -> tuple[Snapshot, list[Region], list[str]]:
    """Snapshot, named regions and notes of a checkpoint."""
    from pagelens.checkpoint.stored import Stored
    from pagelens.vm.regions import Evidence, name_regions

    shot = Stored.open(path).snapshot()
    return shot, name_regions(shot.vmas, Evidence()), list(shot.notes)


def diff(args: argparse.Namespace) -> None:
    """Contents of two checkpoints, or of a checkpoint and a process now, compared byte by byte."""
    from pagelens.checkpoint import look as looking
    from pagelens.linux.symbols import Symbolizer
    from pagelens.vm.regions import Evidence, Kind, name_regions

    if args.b is None:
        raise UsageError("diff of a checkpoint needs a second side: another checkpoint, or a process id")
    for text in (args.a, args.b):
        if not text.isdigit() and not is_checkpoint(text):
            raise UsageError(f"{text} is neither a checkpoint nor a process id; contents need one of them")
    first, second = looking.open_side(args.a), looking.open_side(args.b)
    found = looking.diff(first, second)
    named: dict[int, Region] = {}
    for side in (first, second):
        named |= {region.start: region for region in name_regions(side.vmas, Evidence())}
    rows = []
    symbolizer: Any = None
    for region in found.regions:
        name = named.get(region.start)
        symbols: list[str] = []
        if region.pages and name is not None and name.kind in (Kind.DATA, Kind.BSS, Kind.RELRO, Kind.ANON):
            symbolizer = symbolizer or Symbolizer()
            symbols = _symbols(first, second, region, symbolizer)
        rows.append(
            {
                "start": region.start,
                "end": region.end,
                "perms": region.perms,
                "kind": str(name.kind) if name is not None else None,
                "name": name.label if name is not None else region.name,
                "pages": region.pages,
                "bytes": region.nbytes,
                "only_first": region.only_first,
                "only_second": region.only_second,
                "symbols": symbols,
                "runs": [f"{start:#x}+{pages}" for start, pages in region.runs[:8]]
                + ([f"… {len(region.runs) - 8} more"] if len(region.runs) > 8 else []),
            }
        )
    notes = [f"{found.pages:,} pages differ in {found.nbytes:,} bytes; compared by contents, complete"]
    for tid, names in found.registers.items():
        notes.append(f"thread {tid}: registers that differ: {' '.join(names)}")
    for what, tids in (
        ("first", found.threads_only_first),
        ("second", found.threads_only_second),
    ):
        if tids:
            notes.append(f"threads only in the {what}: {' '.join(map(str, tids))}")
    emit(args, DIFF, rows, notes=notes)


def _symbols(first: Any, second: Any, region: Any, symbolizer: Any) -> list[str]:
    # Objects of a program's or library's data and bss whose bytes differ: "name (bytes)", most bytes first.
    from pagelens.checkpoint import look as looking
    from pagelens.report import stores

    words = looking.changed_words(first, second, region)
    found: dict[str, int] = {}
    at = 0
    while at < len(words):
        address = int(words[at, 0])
        for byte in range(8):  # objects can be smaller than a word, and begin within it
            known = stores.data_object(second.vmas, address + byte, symbolizer)
            if known is not None:
                break
        else:
            if at == 0 and stores.data_object(second.vmas, region.start, symbolizer) is None and not found:
                return []  # most likely nothing of an image
            at = int(np.searchsorted(words[:, 0], np.uint64((address | PAGE_SIZE - 1) + 1)))
            continue
        end = int(np.searchsorted(words[:, 0], np.uint64(max(known[2], address + 1))))
        found[known[0]] = found.get(known[0], 0) + int(words[at:end, 1].sum())
        at = end
    ranked = sorted(found.items(), key=lambda item: -item[1])
    shown = [f"{name} ({count})" for name, count in ranked[:_MOST_SYMBOLS]]
    return shown + ([f"… {len(ranked) - _MOST_SYMBOLS} more"] if len(ranked) > _MOST_SYMBOLS else [])
