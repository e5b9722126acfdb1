"""A capture at a glance, as lines of text: counts by kind, the largest takers, losses."""

from __future__ import annotations

from typing import Any

from pagelens.capture.reader import Capture
from pagelens.capture.summary import text


def lines(capture: Capture, summary: dict[str, Any]) -> list[str]:
    """For `pagelens summary`."""
    import pyarrow.compute as pc

    meta = capture.meta
    out = [
        f"capture   {capture.path}",
        f"program   {' '.join(meta.get('command', []))}",
        f"kernel    {meta.get('kernel', '?')}; detail {meta.get('detail', '?')},"
        f" snapshots {meta.get('snapshot', '?')}",
    ]
    events = capture.table("events", ["kind", "name", "mm", "pid"])
    by_kind = events.group_by("kind").aggregate([("kind", "count")]).to_pylist()
    counts = ", ".join(f"{r['kind_count']:,} {r['kind']}" for r in sorted(by_kind, key=lambda r: r["kind"]))
    tasks = capture.table("tasks", ["pid", "tid"])
    processes = len(set(tasks.column("pid").to_pylist()))
    spaces = capture.table("mms", ["mm"]).num_rows
    out.append(f"events    {counts or 'none'}")
    out.append(f"tree      {processes:,} processes, {tasks.num_rows:,} threads, {spaces:,} address spaces")
    out += text(summary).splitlines()
    faults = events.filter(pc.equal(events.column("kind"), "fault"))
    paths = {r["mm"]: r["path"] for r in capture.table("mms", ["mm", "path"]).to_pylist()}
    top = faults.group_by("mm").aggregate([("mm", "count")]).to_pylist()
    for row in sorted(top, key=lambda r: -r["mm_count"])[:5]:
        out.append(f"  mm {row['mm']:<4} {row['mm_count']:>10,} faults  {paths.get(row['mm']) or ''}")
    for row in capture.table("losses").to_pylist():
        out.append(f"loss      {row['count']:,} {row['note']}")
    out += [f"missing   {m}" for m in capture.missing]
    return out
