"""How much a test may do: an emulated machine (qemu's TCG) is ten to thirty times slower."""

from __future__ import annotations

import os
from pathlib import Path

EMULATED = "TCG" in Path("/proc/cpuinfo").read_text()


def rounds(count: int, least: int = 3) -> int:
    """`count` rounds on a real machine, a tenth in an emulated one; $PAGELENS_TEST_ROUNDS is a factor."""
    factor = float(os.environ.get("PAGELENS_TEST_ROUNDS", "0.1" if EMULATED else "1"))
    return max(least, round(count * factor))


def patience(seconds: float) -> float:
    """How long to wait for what takes `seconds` at most on a real machine, however busy that is."""
    return seconds * (10 if EMULATED else 1)
