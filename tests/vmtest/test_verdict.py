"""How a guest's end is told from its console and ports."""

from __future__ import annotations

import pytest

from vmtest.verdict import End, judge

PANIC = "[    9.1] Kernel panic - not syncing: sysrq triggered crash\n[    9.2] ---[ end Kernel panic ]---\n"
OOM = "[   31.0] Out of memory: Killed process 77 (python) total-vm:900000kB, anon-rss:800000kB\n"
CGROUP_OOM = "[   31.0] Memory cgroup out of memory: Killed process 77 (python) total-vm:9000kB\n"
STUCK = "[   60.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [spin:88]\n"
BUG = "[   12.0] BUG: kernel NULL pointer dereference, address: 0000000000000000\n"


@pytest.mark.parametrize(
    ("code", "ready", "silent", "timed_out", "console", "end", "says"),
    [
        (0, True, None, False, "", End.EXITED, ""),
        (7, True, None, False, "", End.EXITED, ""),
        (None, True, None, False, PANIC, End.PANIC, "sysrq triggered crash"),
        (None, False, None, False, PANIC, End.PANIC, "sysrq triggered crash"),
        (None, True, 60.0, False, PANIC, End.PANIC, "sysrq triggered crash"),
        (137, True, None, False, OOM, End.OOM, "Killed process 77 (python) total-vm:900000kB"),
        (0, True, None, False, OOM, End.OOM, "Killed process 77"),
        (0, True, None, False, CGROUP_OOM, End.EXITED, ""),
        (0, True, None, False, BUG, End.PANIC, "NULL pointer dereference"),
        (None, True, 60.0, False, "", End.HANG, "no sign of life for 60 s"),
        (None, True, 60.0, False, STUCK, End.HANG, "soft lockup"),
        (None, True, None, True, "", End.TIMEOUT, "still ran after 900 s"),
        (None, False, None, True, "", End.NO_BOOT, "no command started within 900 s"),
        (None, False, None, False, "", End.NO_BOOT, "stopped before"),
        (None, True, None, False, "", End.LOST, "no exit code"),
    ],
)
def test_judge(
    code: int | None, ready: bool, silent: float | None, timed_out: bool, console: str, end: End, says: str
) -> None:
    found, detail = judge(
        code=code, ready=ready, silent_s=silent, timed_out=timed_out, limit_s=900, console=console
    )
    assert found is end
    assert says in detail
