"""How much a test may do: an emulated machine (qemu's TCG) is ten to thirty times slower."""

from __future__ import annotations

import os
from pathlib import Path

EMULATED = "TCG" in Path("/proc/cpuinfo").read_text()


def rounds(count: int) -> int:
    """`count` rounds on a real machine, a tenth in an emulated one; $PAGELENS_TEST_ROUNDS is a factor."""
    factor = float(os.environ.get("PAGELENS_TEST_ROUNDS", "0.1" if EMULATED else "1"))
    return max(3, round(count * factor))
