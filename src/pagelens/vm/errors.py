"""Errors that reach a user: one sentence, the fix where there is one, and the exit code.

They live in the lowest layer because every layer raises them. `cli.main` prints `str(error)` and exits
with `exit_code`; anything else that escapes is a bug in pagelens (70).
"""

from __future__ import annotations


class PagelensError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 70


class UsageError(PagelensError):
    """The request makes no sense: wrong argument, refused range, output that exists."""

    exit_code = 2


class CapabilityMissingError(PagelensError):
    """The kernel, the privilege or a tool is missing; `fix` is the exact command that grants it."""

    exit_code = 3

    def __init__(self, message: str, *, capability: str = "", fix: str = "") -> None:
        super().__init__(f"{message}; fix: {fix}" if fix else message)
        self.capability = capability
        self.fix = fix


class TargetGoneError(PagelensError):
    """The process vanished, is a zombie, or its pid was reused."""

    exit_code = 4


class DamagedInputError(PagelensError):
    """A capture, checkpoint, scenario or kernel file is foreign, truncated or corrupt."""

    exit_code = 5
