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
from vmtest.fetch import Kernel


@dataclass(frozen=True)
class Allowed:
    """One entry: these tests, on kernels older than `before`, or of these names, with a reason of this form."""

    before: tuple[int, ...]
    kernels: tuple[str, ...]
    tests: str
    reason: str
    why: str

    def covers(self, kernel: Kernel, test: str, reason: str) -> bool:
        """`reason` is what pytest reports, `Skipped: …`."""
        release = re.match(r"(\d+)\.(\d+)", kernel.release)
        older = release is not None and (int(release[1]), int(release[2])) < self.before
        return (
            (older or any(fnmatch.fnmatch(kernel.name, k) for k in self.kernels))
            and fnmatch.fnmatch(test, self.tests)
            and re.search(self.reason, reason) is not None
        )


def load(path: Path) -> list[Allowed]:
    """The entries of the file. Raises VmtestError when it is malformed."""
    try:
        table = tomllib.loads(path.read_text())
        return [
            Allowed(
                tuple(map(int, e["before"].split("."))) if "before" in e else (),
                tuple(e["kernels"] if "before" not in e else e.get("kernels", ())),
                e.get("tests", "*"),
                e["reason"],
                e["why"],
            )
            for e in table.get("skip", [])
        ]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise VmtestError(f"{path.name} is malformed: {error}") from None
