"""What `map`, `pages` and `diff` show of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.cli.output import Col, emit
from pagelens.vm.errors import UsageError
from pagelens.vm.regions import Region
from pagelens.vm.snapshot import Snapshot

DIFF = (
    Col("start", kind="addr"),
    Col("end", kind="addr"),
    Col("perms"),
    Col("kind"),
    Col("name"),
    Col("pages", "pages differ", "int"),
    Col("bytes", "bytes differ", "int"),
    Col("only_first", kind="int"),
    Col("only_second", kind="int"),
    Col("runs", "at", "list"),
)


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
    from pagelens.vm.regions import Evidence, name_regions

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
    for region in found.regions:
        name = named.get(region.start)
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
