"""How a guest ended, from what its ports and its console said.

A guest that panics, hangs or runs out of memory must be told from a command that failed: each has its own
line, with the console's last lines as evidence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class End(Enum):
    """Why a guest's run was over."""

    EXITED = "the command ended"
    PANIC = "the kernel panicked"
    OOM = "the guest ran out of memory"
    HANG = "the guest hung"
    TIMEOUT = "the time limit was reached"
    NO_BOOT = "the guest did not come up"
    LOST = "the guest went away without a word"


@dataclass(frozen=True)
class Verdict:
    """The end of one guest. `code` is the command's exit code where there is one."""

    end: End
    code: int | None
    detail: str
    boot_s: float | None
    total_s: float
    console: str

    @property
    def good(self) -> bool:
        """The guest itself behaved: what the command's code says is for the caller."""
        return self.end is End.EXITED

    def report(self, lines: int = 40) -> str:
        """A sentence, and the console's last lines where the guest itself failed."""
        if self.good:
            return f"exit code {self.code} after {self.total_s:.1f} s"
        tail = "\n".join("  | " + line for line in self.console.splitlines()[-lines:])
        return f"{self.end.value}: {self.detail} (after {self.total_s:.1f} s)\n{tail}"


_PANIC = re.compile(r"Kernel panic - not syncing: (.*)")
_OOPS = re.compile(r"(BUG: .*|kernel BUG at .*|Oops: .*|general protection fault.*)")
# A kill inside a memory cgroup says "Memory cgroup out of memory": a test may want that.
_OOM = re.compile(r"(?:^|\] )Out of memory: (Killed process \d+ \([^)]*\)[^,]*)", re.MULTILINE)
_STUCK = re.compile(
    r"(watchdog: BUG: soft lockup.*|rcu: INFO: rcu_\w+ .*stall.*|INFO: task .* blocked for more.*)"
)


def judge(
    *,
    code: int | None,
    ready: bool,
    silent_s: float | None,
    timed_out: bool,
    limit_s: float,
    console: str,
) -> tuple[End, str]:
    """(end, detail) of a run. `silent_s`: how long there was no sign of life, when that ended it.

    The order matters: a panic also looks like silence, and a kill for memory also looks like exit code 137.
    """
    if match := _PANIC.search(console):
        return End.PANIC, match[1].strip()
    if match := _OOM.search(console):
        return End.OOM, match[1].strip()
    if code is not None:
        if match := _OOPS.search(console):
            return End.PANIC, f"the kernel reported {match[1].strip()}"
        return End.EXITED, ""
    stuck = _STUCK.search(console)
    if not ready:
        return (
            End.NO_BOOT,
            f"no command started within {limit_s:.0f} s" if timed_out else "it stopped before its command",
        )
    if silent_s is not None:
        why = f"; console: {stuck[1].strip()}" if stuck else ""
        return End.HANG, f"no sign of life for {silent_s:.0f} s{why}"
    if timed_out:
        return End.TIMEOUT, f"the command still ran after {limit_s:.0f} s; the guest was alive"
    return End.LOST, "qemu ended with no exit code from the guest"
