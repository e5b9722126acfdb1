"""Which tests may be skipped on which kernel: tests/kernels/allowed_skips.toml.

A skip says "this kernel cannot"; unless that is written down with its reason, it may as well be a test that
stopped working. So a skip that no entry allows is a failure.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from vmtest.errors import VmtestError


@dataclass(frozen=True)
class Allowed:
    """One entry: these tests, on these kernels, with a reason of this form."""

    kernels: tuple[str, ...]
    tests: str
    reason: str
    why: str

    def covers(self, kernel: str, test: str, reason: str) -> bool:
        """`reason` is what pytest reports, `Skipped: …`."""
        return (
            any(fnmatch.fnmatch(kernel, k) for k in self.kernels)
            and fnmatch.fnmatch(test, self.tests)
            and re.search(self.reason, reason) is not None
        )


def load(path: Path) -> list[Allowed]:
    """The entries of the file. Raises VmtestError when it is malformed."""
    try:
        table = tomllib.loads(path.read_text())
        return [
            Allowed(tuple(e["kernels"]), e.get("tests", "*"), e["reason"], e["why"])
            for e in table.get("skip", [])
        ]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise VmtestError(f"{path.name} is malformed: {error}") from None
