"""Verdict: what a cause rule concludes about a fault, and how sure it is.

Confidence is one of four words, never a percentage: a percentage would be a figure without a method.
"certain" = the evidence admits nothing else; "likely" = one rule fits, but it rests on something that was
inferred (said in `why`); "ambiguous" = several fit, all are named; "unknown" = none fits. The last two are
counted and shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CERTAIN = "certain"
LIKELY = "likely"
AMBIGUOUS = "ambiguous"
UNKNOWN = "unknown"

DOC = "docs/causes.md"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One conclusion.

    cause: slug of a rule, "ambiguous" or "unknown". why: one sentence that names the deciding evidence.
    candidates: slugs of all rules that fit, where ambiguous. evidence: rows (dicts with at least seq and
    what) that a reader can look up with `query`; filled in where a single fault is explained, empty in bulk.
    remedy: what one can do about it. doc: where it is explained.
    """

    cause: str
    confidence: str
    why: str
    remedy: str = ""
    doc: str = DOC
    candidates: tuple[str, ...] = ()
    evidence: tuple[dict[str, Any], ...] = field(default_factory=tuple)
