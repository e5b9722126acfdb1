"""Kill pagelens at random moments of recordings, and see that the recorded program does not notice.

  python tools/recorder_kills.py [TRIALS] [SEED]     (default 50; prints one line and the seed; exit code 1 on harm)

Each trial records a program that faults, forks, starts threads and hashes what it wrote, in a random mode (snapshots
or none, lean or normal, run or attach), kills pagelens at a random moment, and compares the program's output with
that of a run alone. What is left of the capture must be recoverable.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SRC = Path(__file__).parent.parent / "src"
ENV = {**os.environ, "PYTHONPATH": str(SRC)}
PAGELENS = [sys.executable, "-m", "pagelens.cli.main"]
PROGRAM = """
import hashlib, os, sys, threading
open(sys.argv[2], "w").write(str(os.getpid()) + "\\n")
h = hashlib.sha256()
def work(i, out):
    x = bytearray(200000); x[::4096] = bytes([i % 251]) * len(x[::4096]); out.append(hashlib.sha256(x).digest())
for i in range(80):
    out = []
    t = threading.Thread(target=work, args=(i, out)); t.start(); t.join(); h.update(out[0])
    if i % 8 == 0:
        pid = os.fork()
        if pid == 0: os._exit(i % 7)
        h.update(bytes([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]))
open(sys.argv[1], "w").write(h.hexdigest())
"""


def wait_for(condition: object, seconds: float = 60) -> None:
    """Until the callable is true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.003)


def gone(pid: int) -> bool:
    """Whether the process is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def trial(work: Path, number: int, rng: random.Random, expected: str) -> str:
    """ "" or what went wrong."""
    out, pidfile, capture = (work / f"{name}{number}" for name in ("out", "pid", "c.plens"))
    command = [sys.executable, "-c", PROGRAM, str(out), str(pidfile)]
    options = ["-c", str(capture), "--snapshot", rng.choice(["none", "full"]), "--detail"]
    options.append(rng.choice(["lean", "normal", "full"]))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENV}
    attached = rng.random() < 0.3
    if not attached and rng.random() < 0.3:  # without BPF; half of these with every system call stopped
        options[options.index("--snapshot") + 1] = "full"
        options += rng.choice([["--method", "perf"], ["--calls", "ptrace"]])
    started = None
    if attached:
        started = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        recorder = subprocess.Popen([*PAGELENS, "attach", str(started.pid), *options], **quiet)  # type: ignore[call-overload]
        time.sleep(rng.random() * 2)
    else:
        recorder = subprocess.Popen([*PAGELENS, "run", *options, "--", *command], **quiet)  # type: ignore[call-overload]
        wait_for(lambda: pidfile.exists() and pidfile.read_text().endswith("\n"))
        time.sleep(rng.random())
    recorder.kill()
    recorder.wait()
    pid = int(pidfile.read_text()) if pidfile.exists() and pidfile.read_text() else 0
    if pid:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text() and not gone(pid):
                return "still traced"
        wait_for(lambda: gone(pid))
    if started:
        started.wait(60)
    mode = f"{'attach' if attached else 'run'} {' '.join(options[2:])}"
    if not out.exists() or out.read_text() != expected:
        return f"{mode}: output differs"
    if capture.exists():
        recover = [*PAGELENS, "recover", str(capture)]
        done = subprocess.run(recover, capture_output=True, text=True, env=ENV, check=False)
        if done.returncode and (capture / "meta.json").exists():
            return f"{mode}: recover: {done.stderr.strip()}"
    return ""


def main() -> int:
    """All trials."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="pagelens-kills-") as name:
        work = Path(name)
        alone = work / "alone"
        subprocess.run([sys.executable, "-c", PROGRAM, str(alone), str(work / "p")], check=True)
        harm = [h for n in range(trials) if (h := trial(work, n, rng, alone.read_text()))]
    for line in harm:
        print(line)
    print(f"{trials} kills, seed {seed}: {len(harm)} harmed")
    return 1 if harm else 0


if __name__ == "__main__":
    sys.exit(main())
