"""The causes, one rule per small file, and the replay that feeds them; writes derived tables.

    result = why.classify(capture)      # verdicts on every fault
    result.counts()                     # by cause
    why.derive(capture)                 # derived/causes, which `query` joins

Facts come in, verdicts go out: nothing here reads the kernel.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagelens.why.classified import Classified, classify_facts
    from pagelens.why.derived import classify, conclusions, derive, summary_fields, table
    from pagelens.why.kept import known, summary_lines
    from pagelens.why.verdict import Verdict

_HOME = {
    "Classified": "pagelens.why.classified",
    "Verdict": "pagelens.why.verdict",
    "classify": "pagelens.why.derived",
    "classify_facts": "pagelens.why.classified",
    "conclusions": "pagelens.why.derived",
    "derive": "pagelens.why.derived",
    "summary_fields": "pagelens.why.derived",
    "known": "pagelens.why.kept",
    "summary_lines": "pagelens.why.kept",
    "table": "pagelens.why.derived",
}

__all__ = [
    "Classified",
    "Verdict",
    "classify",
    "classify_facts",
    "conclusions",
    "derive",
    "known",
    "summary_fields",
    "summary_lines",
    "table",
]


def __getattr__(name: str) -> Any:
    # numpy and pyarrow only where they are used.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pagelens.why' has no attribute {name!r}")
