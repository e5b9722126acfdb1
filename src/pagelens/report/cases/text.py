"""An answer as lines for a person, and as JSON."""

from __future__ import annotations

import json
from typing import Any

from pagelens.report.cases.lab import Answer


def text_lines(answer: Answer, seconds: float | None = None) -> list[str]:
    """An answer as lines."""
    head = f"[{answer.number}] {answer.question}"
    lines = [head + (f"   {answer.headline}" if answer.headline else "")]
    lines += [f"    {tag:<7} {text}" for tag, text in answer.lines]
    lines += [f"    missing {text}" for text in answer.missing]
    whole = "complete" if answer.complete else "incomplete (see missing)"
    took = f"; {seconds:.1f} s" if seconds is not None else ""
    if answer.method:
        lines.append(f"    method  {answer.method}; {whole}{took}")
    if seconds is not None and answer.evidence:
        lines.append("    evidence")
        lines += [
            f"      seq {e['seq']:<7} {e['what']}  {e.get('line', '')}  {e.get('cause', '')}"
            for e in answer.evidence[:12]
        ]
    if seconds is not None and answer.reproduce:
        lines.append(f"    again   {answer.reproduce}")
    return lines


def as_dict(answer: Answer) -> dict[str, Any]:
    """An answer as JSON."""
    value = {
        "number": answer.number,
        "question": answer.question,
        "headline": answer.headline,
        "answer": [{"tag": tag, "text": text} for tag, text in answer.lines],
        "figures": answer.figures,
        "evidence": answer.evidence,
        "method": answer.method,
        "complete": answer.complete,
        "missing": answer.missing,
        "reproduce": answer.reproduce,
    }
    return dict(json.loads(json.dumps(value, default=str)))
