"""Attach to a busy program and detach, again and again, and see that it does not notice.

  python tools/recorder_attach.py [TIMES]     (default 200; exit code 1 on harm)

The program (tests/support/subjects/churn.c) makes and joins threads all the time while queued signals with values
arrive; at its end it says how many came, and their sum. Each recording's equation must come out, too: nothing
unexplained, and lost at most the faults that were being handled while a thread was marked.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

from pagelens.capture.attach import attach  # noqa: E402 - after the path is set
from pagelens.capture.session import Settings  # noqa: E402 - likewise


def main() -> int:
    """All of it."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    sent = total = events = lost = unexplained = 0
    with tempfile.TemporaryDirectory(prefix="pagelens-attach-") as name:
        program = Path(name) / "churn"
        source = ROOT / "tests/support/subjects/churn.c"
        subprocess.run(["gcc", "-O1", "-pthread", "-o", program, source], check=True)
        with subprocess.Popen(
            [str(program), "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            began = time.monotonic()
            for n in range(times):
                for value in (n, n + 1):
                    if libc.sigqueue(child.pid, signal.SIGRTMIN, value) == 0:
                        sent, total = sent + 1, total + value
                settings = Settings(snapshot="none", detail=("lean", "normal", "full")[n % 3])
                done = attach(Path(name) / "c.plens", settings, child.pid, duration=0.02, force=True)
                faults = done.summary["faults"]
                events += json.loads((Path(name) / "c.plens/meta.json").read_text())["rows"]
                lost += faults["lost"]
                unexplained += abs(faults["unexplained"])
            took = time.monotonic() - began
            traced = "TracerPid:\t0" not in Path(f"/proc/{child.pid}/status").read_text()
            out, _ = child.communicate("", timeout=60)
        got, summed, bad = map(int, out.split()[1:4])
    harm = traced or child.returncode or (got, summed, bad) != (sent, total, 0) or unexplained
    print(
        f"{times} attaches in {took:.0f} s: signals {got} of {sent}, exit {child.returncode}, events {events:,},"
        f" lost {lost}, unexplained {unexplained}: {'HARM' if harm else 'unharmed'}"
    )
    return 1 if harm else 0


if __name__ == "__main__":
    sys.exit(main())
