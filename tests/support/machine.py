"""Whose kernel the model is held against: this one's, or that of a virtual machine where `pagelens model serve` runs.

PAGELENS_ON=SOCKET ./dev test tests/proof/test_campaign.py      (docs/scenarios.md)
"""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack

from pagelens.proof.distant import connected
from pagelens.proof.machine import Local, Machine
from pagelens.vm.errors import TargetGoneError


def _machine() -> Machine:
    socket = os.environ.get("PAGELENS_ON")
    if socket is None:
        return Local(max(os.sched_getaffinity(0)))
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(connected(socket))


def lives(pid: int) -> bool:
    """Whether there is such a process there."""
    try:
        handle, *fds = HERE.open(pid)
    except TargetGoneError:
        return False
    HERE.shut(handle, fds)
    return True


HERE = _machine()
RELEASE = str(HERE.facts()["release"])
