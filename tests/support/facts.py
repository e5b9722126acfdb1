"""What differs by kernel, as data: tests measure, expected.toml says what is right from which kernel on.

`fact("merge.stack_beside_malloc", value)` compares with tests/kernels/expected.toml and writes the value
down where $VMTEST_RESULTS says (a guest) or $PAGELENS_FACTS: docs/kernels.md is made of those
(tools/kernels_table.py).
"""

from __future__ import annotations

import json
import os
import platform
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).parents[1] / "kernels" / "expected.toml"
Fact = Callable[[str, Any], None]


def kernel() -> tuple[int, int]:
    """(major, minor) of the running kernel. Tests may ask; pagelens itself never does."""
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    assert match
    return int(match[1]), int(match[2])


def _version() -> str:
    # Debian's release names an ABI (6.1.0-56), not the version it is (6.1.192).
    # The compiler's version comes first in the line.
    debian = re.search(r" Debian (\d\S+) \(\d{4}-", Path("/proc/version").read_text())
    plain = re.match(r"\d+\.\d+(\.\d+)?", platform.release())
    assert plain
    return f"Debian {debian[1]}" if debian else plain[0]


class Facts:
    """The expectations and the record of one session."""

    def __init__(self) -> None:
        path = Path(os.environ.get("PAGELENS_EXPECTED", EXPECTED))
        self._expected = tomllib.loads(path.read_text())
        self._measured: dict[str, Any] = {}

    def expected(self, name: str) -> Any:
        """The value that holds for the running kernel: that of the latest version named that is not newer."""
        entry = self._expected[name]
        best = None
        for version, value in entry["since"].items():
            if tuple(int(x) for x in version.split(".")) <= kernel():
                best = value  # the file lists versions in order
        assert best is not None, f"{name} says nothing of kernel {kernel()}"
        return best

    def __call__(self, name: str, value: Any) -> None:
        self._measured[name] = value
        self._save()
        if "PAGELENS_MEASURE_ONLY" in os.environ:  # a new kernel, whose values nobody knows yet
            return
        expected = self.expected(name)
        assert value == expected, (
            f"{name}: measured {value!r}, expected {expected!r} on kernel {platform.release()}"
        )

    def _save(self) -> None:
        place = os.environ.get("PAGELENS_FACTS")
        if place is None and "VMTEST_RESULTS" in os.environ:
            place = os.environ["VMTEST_RESULTS"] + "/facts.json"
        if place:
            record = {"kernel": _version(), "facts": self._measured}
            Path(place).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
