"""Finish a capture whose recorder was killed: convert the spool that it left, say what cannot be known.

The kernel's counters at the end are gone with the recorder for tasks that were still running; `tasks` holds
those that had ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagelens.capture.directory import SPOOL, segments
from pagelens.capture.reader import Capture
from pagelens.capture.store import CaptureWriter
from pagelens.capture.summary import summarize


def recover(path: Path) -> dict[str, Any]:
    """Convert what is left; returns {"segments", "rows", "truncated_bytes"}. DamagedInputError as Capture."""
    capture = Capture(path)
    left = segments(path / SPOOL)
    if not left and capture.meta.get("status") != "recording":
        return {"segments": 0, "rows": 0, "truncated_bytes": 0}
    writer = CaptureWriter.reopen(path, capture.meta)
    seq = capture.table("events", ["seq"]).column("seq").to_numpy()
    writer.next_seq = int(seq.max()) + 1 if len(seq) else 0
    rows = truncated = 0
    for segment in left:
        done = writer.add_segment(segment)
        rows += done.rows
        truncated += done.truncated
    if truncated:
        writer.write(
            "losses",
            [
                {
                    "time_ns": 0,
                    "what": "spool",
                    "count": truncated,
                    "note": "bytes of rows cut off by the kill",
                }
            ],
            part=99_999_999,
        )
    for table in path.iterdir():
        for aside in table.glob(".part-*.new") if table.is_dir() else ():
            aside.unlink()
    writer.finish(status="recovered")
    writer.write_meta(summary=summarize(Capture(path)))
    return {"segments": len(left), "rows": rows, "truncated_bytes": truncated}
