"""A capture at a glance: counts by kind, the largest takers, losses; counted once, then lines of text.

Counting reads every event; the lines need only the counts, which `why` keeps beside its conclusions.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pagelens.capture.directory import CaptureDirectory
from pagelens.capture.summary import text

if TYPE_CHECKING:
    from pagelens.capture.reader import Capture

_TOP = 5


def count(capture: Capture) -> dict[str, Any]:
    """{"events": {kind: rows}, "processes", "threads", "spaces", "top": [[mm, faults, path], …] (most faults
    first), "losses": [[count, note], …]}, ready for JSON. DamagedInputError where a part cannot be read."""
    import numpy as np

    from pagelens.capture.reader import plain, read_batches

    events: Counter[str] = Counter()
    by_mm: Counter[int] = Counter()
    for part in capture.parts("events"):
        for batch in read_batches(part, ["kind", "mm"]):
            codes = plain(batch.column("kind").indices, -1)
            for code, name in enumerate(batch.column("kind").dictionary.to_pylist()):
                mine = codes == code
                events[name] += int(np.count_nonzero(mine))
                if name == "fault":
                    faults = np.bincount(plain(batch.column("mm"), 0)[mine])
                    by_mm.update({mm: int(faults[mm]) for mm in np.flatnonzero(faults).tolist()})
    tasks = capture.table("tasks", ["pid", "tid"])
    paths = {r["mm"]: r["path"] for r in capture.table("mms", ["mm", "path"]).to_pylist()}
    return {
        "events": {kind: n for kind, n in sorted(events.items()) if n},
        "processes": len(set(tasks.column("pid").to_pylist())),
        "threads": tasks.num_rows,
        "spaces": capture.table("mms", ["mm"]).num_rows,
        "top": [[mm, faults, paths.get(mm) or ""] for mm, faults in by_mm.most_common(_TOP)],
        "losses": [[r["count"], r["note"]] for r in capture.table("losses").to_pylist()],
    }


def lines(capture: CaptureDirectory, summary: dict[str, Any], counts: dict[str, Any]) -> list[str]:
    """For `pagelens summary`. counts: as `count` gives them."""
    meta = capture.meta
    out = [
        f"capture   {capture.path}",
        f"program   {' '.join(meta.get('command', []))}",
        f"kernel    {meta.get('kernel', '?')}; detail {meta.get('detail', '?')},"
        f" snapshots {meta.get('snapshot', '?')}",
    ]
    events = ", ".join(f"{n:,} {kind}" for kind, n in counts["events"].items())
    out.append(f"events    {events or 'none'}")
    out.append(
        f"tree      {counts['processes']:,} processes, {counts['threads']:,} threads,"
        f" {counts['spaces']:,} address spaces"
    )
    out += text(summary).splitlines()
    out += [f"  mm {mm:<4} {faults:>10,} faults  {path}" for mm, faults, path in counts["top"]]
    out += [f"loss      {n:,} {note}" for n, note in counts["losses"]]
    out += [f"missing   {m}" for m in capture.missing]
    return out
