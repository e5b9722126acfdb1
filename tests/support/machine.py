"""Whose kernel the model is held against: this one's, or that of a virtual machine where `pagelens model serve` runs.

PAGELENS_ON=SOCKET ./dev test tests/proof/test_campaign.py      (docs/scenarios.md)
"""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack
from pathlib import Path

from pagelens.cli.model import machine_of
from pagelens.proof.machine import Local
from pagelens.vm.errors import TargetGoneError


def lives(pid: int) -> bool:
    """Whether there is such a process there; here, a zombie is one."""
    if isinstance(HERE, Local):
        return Path(f"/proc/{pid}").exists()
    try:
        handle, *fds = HERE.open(pid)
    except TargetGoneError:
        return False
    HERE.shut(handle, fds)
    return True


_stack = ExitStack()
atexit.register(_stack.close)
HERE = _stack.enter_context(machine_of(os.environ.get("PAGELENS_ON")))
RELEASE = str(HERE.facts()["release"])
