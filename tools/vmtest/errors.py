"""The one error that a person sees: a sentence, no traceback."""

from __future__ import annotations


class VmtestError(Exception):
    """Something outside the tests failed: no package, no qemu, no such kernel."""
