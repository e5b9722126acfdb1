"""What was found out about a capture, kept beside its facts: derived/meta.json.

A million faults need not be read again to say what they were: verdicts by cause and the counts of `summary`
are kept with the state of all parts they came from (name, size, time of change), and are worth nothing once
a part differs (recovered, trimmed, cut short). Here and not in `derived` because reading them needs neither
numpy nor pyarrow. Rejected: sizes alone, which a flipped byte does not change.
"""

from __future__ import annotations

import json
from typing import Any

from pagelens.capture.directory import CaptureDirectory

RULES_VERSION = 9  # of what the rules conclude and what is kept: raise it when a verdict or a count changes
DERIVED = "derived"


def known(capture: CaptureDirectory) -> dict[str, Any] | None:
    """The fields that `why.conclusions` would give, None where they are not kept or a part has changed since."""
    try:
        kept = json.loads((capture.path / DERIVED / "meta.json").read_text())
        if kept["state"] == state(capture) and (capture.path / DERIVED / "causes").is_dir():
            return dict(kept["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not derived yet, or half-written
    return None


def state(capture: CaptureDirectory) -> dict[str, Any]:
    """What conclusions rest on: the rules, and every part of every table."""
    parts = []
    for path in sorted(capture.path.glob("*/part-*.parquet")):
        found = path.stat()
        parts.append([f"{path.parent.name}/{path.name}", found.st_size, found.st_mtime_ns])
    return {"rules": RULES_VERSION, "parts": parts}


def summary_lines(fields: dict[str, Any], most: int = 8) -> list[str]:
    """The causes as lines for a person, the largest first."""
    causes, titles = fields["causes"], fields["titles"]
    lines = [
        f"{row['faults']:>10,} {row['share']:>6.1%}  {row['cause']:<18} {titles[row['cause']]}"
        for row in causes[:most]
    ]
    rest = sum(row["faults"] for row in causes[most:])
    if rest:
        lines.append(
            f"{rest:>10,} {sum(r['share'] for r in causes[most:]):>6.1%}  {len(causes) - most} other causes"
        )
    gone = next((row["share"] for row in causes if row["cause"] == "sharers-gone"), 0.0)
    open_ = min(gone, fields["ambiguous_share"])
    if not causes:
        return ["no faults to explain"]
    lines.append(f"unknown {fields['unknown_share']:.3%}, ambiguous {fields['ambiguous_share'] - open_:.3%}")
    if open_:
        lines[-1] += f"; {open_:.1%} where only the outcome is open (sharers-gone: reused or copied)"
    lines.append("method: calls replayed, each fault judged by the rules of docs/causes.md")
    return lines
