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
    known = capture.meta.get("summary") if capture.meta.get("status") != "recording" else None
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
    summary = summarize(Capture(path)) if known is None else _found_again(known, writer.recorded)
    writer.write_meta(summary=summary)
    return {"segments": len(left), "rows": rows, "truncated_bytes": truncated}


def _found_again(summary: dict[str, Any], recorded: int) -> dict[str, Any]:
    """The figures of a recording that ended by itself (on a full disk), with `recorded` of its lost faults found."""
    faults = {**summary["faults"]}
    faults["recorded"] += recorded
    faults["lost"] = max(0, faults["lost"] - recorded)
    return {**summary, "faults": faults, "status": "recovered"}
