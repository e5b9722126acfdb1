"""pagelens: the pages of a Linux process, the faults that made them, and why.

The Python API is the same objects as the command line; names are imported on first use so that
`import pagelens` and `pagelens --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module; filled in as each capability lands.
_API: dict[str, str] = {
    "Capture": "pagelens.capture.reader",
    "snapshot": "pagelens.linux.snapshot",
    "track": "pagelens.dirty.track",
    "Tracker": "pagelens.dirty.track",
    "Checkpoint": "pagelens.checkpoint.fast",
}

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module 'pagelens' has no attribute {name!r}")
