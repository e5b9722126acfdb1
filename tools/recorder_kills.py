"""Kill pagelens at random moments of recordings, and see that the recorded program does not notice.

  python tools/recorder_kills.py [TRIALS] [SEED]     (default 50; prints one line and the seed; exit code 1 on harm)

Each trial records a program that faults, forks, starts threads and hashes what it wrote, in a random mode (see MODES:
run or attach, as root, as root without BPF and tracefs, as nobody, in a sandbox without perf, by stops of every call;
snapshots or none; lean, normal or full), kills pagelens at a random moment, and compares the program's output with that
of a run alone. No thread may be traced afterwards, none stopped, no process left. What is left of the capture must be
recoverable.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SRC = Path(__file__).parent.parent / "src"
ENV = {**os.environ, "PYTHONPATH": str(SRC)}
PAGELENS = [sys.executable, "-m", "pagelens.cli.main"]
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
# Root's way down: with neither CAP_BPF nor CAP_PERFMON nor what stands for both, tracefs is of no use either.
NO_BPF = ["setpriv", "--bounding-set", "-bpf,-perfmon,-sys_admin", "--inh-caps", "-bpf,-perfmon,-sys_admin"]
# Mode: (under what, what is asked of pagelens, with what options). DOCKER: a container's seccomp filter, without perf.
MODES: dict[str, tuple[str, str, list[str]]] = {
    "run": ("", "run", []),
    "run, perf": ("", "run", ["--method", "perf"]),
    "run, calls by ptrace": ("", "run", ["--calls", "ptrace"]),
    "run without BPF": ("no-bpf", "run", []),
    "run as nobody": ("nobody", "run", []),
    "run as nobody, calls by ptrace": ("nobody", "run", ["--calls", "ptrace"]),
    "run in a sandbox": ("docker", "run", []),
    "run in a sandbox, calls by ptrace": ("docker", "run", ["--calls", "ptrace"]),
    "attach": ("", "attach", []),
    "attach --tree": ("", "attach", ["--tree"]),
    "attach, perf": ("", "attach", ["--method", "perf"]),
    "attach without BPF": ("no-bpf", "attach", ["--tree"]),
    "attach as nobody": ("nobody", "attach", ["--tree"]),
}
# Of the system where there is one: nobody may not be able to read this environment's.
PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
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


def members(mark: str) -> dict[int, str]:
    """Processes of the trial by pid, with what harm there is to see: the mark is in their command line."""
    out = {}
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not path.name.isdigit() or mark.encode() not in (path / "cmdline").read_bytes():
                continue
            harm = ""
            out[int(path.name)] = ""
            for task in (path / "task").iterdir():
                with contextlib.suppress(OSError):  # threads come and go
                    status = (task / "status").read_text()
                    harm += "traced " if "TracerPid:\t0" not in status else ""
                    harm += "stopped " if re.search(r"^State:\t[tT]", status, re.MULTILINE) else ""
            out[int(path.name)] = harm
    return out


def after_the_kill(mark: str, held: bool) -> str:
    """What is wrong with what goes on: "" where nobody is traced or stopped. held: ptrace was in use, and its kernel
    work of letting go may take a moment."""
    deadline = time.monotonic() + (2 if held else 0)
    while True:
        harm = [f"{pid} {how}" for pid, how in members(mark).items() if how]
        if not harm or time.monotonic() >= deadline:
            return " ".join(harm)
        time.sleep(0.01)


def trial(work: Path, number: int, rng: random.Random, expected: str, confined: Path) -> tuple[str, str]:
    """(mode, "" or what went wrong)."""
    place = work / str(number)
    place.mkdir()
    place.chmod(0o777)
    out, pidfile, capture = (place / name for name in ("out", "pid", "c.plens"))
    mode = list(MODES)[number % len(MODES)]
    by, verb, options = MODES[mode]
    under = {"": [], "nobody": NOBODY, "no-bpf": NO_BPF, "docker": [str(confined), "docker"]}[by]
    command = [PYTHON, "-c", PROGRAM, str(out), str(pidfile)]
    snapshot = rng.choice(["maps", "full"] if "--calls" in options else ["none", "maps", "full"])
    options = ["-c", str(capture), "--snapshot", snapshot, *options]
    options += ["--detail", rng.choice(["lean", "normal", "full"])]
    env = ENV if by != "nobody" else {**ENV, "HOME": str(place)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": place}
    started = None
    if verb == "attach":
        started = subprocess.Popen([*(NOBODY if by == "nobody" else []), *command], **quiet)  # type: ignore[call-overload]
        wait_for(lambda: pidfile.exists() and pidfile.read_text().endswith("\n"))
        argv = [*under, *PAGELENS, "attach", str(started.pid), *options]
        recorder = subprocess.Popen(argv, **quiet)  # type: ignore[call-overload]
        time.sleep(rng.random() * 2)
    else:
        recorder = subprocess.Popen([*under, *PAGELENS, "run", *options, "--", *command], **quiet)  # type: ignore[call-overload]
        wait_for(
            lambda: (pidfile.exists() and pidfile.read_text().endswith("\n")) or recorder.poll() is not None
        )
        time.sleep(rng.random())
    early = recorder.poll()
    recorder.kill()
    recorder.wait()
    mode += f" --snapshot {snapshot}"
    if early not in (None, 0, 3, 4):
        return mode, f"pagelens had ended with {early}"
    if harm := after_the_kill(str(place), held=verb == "run"):
        return mode, harm
    wait_for(lambda: not members(str(place)))
    if started:
        started.wait(60)
    if not out.exists() or out.read_text() != expected:
        return mode, "output differs" if out.exists() else "no output"
    if left := members(str(place)):
        return mode, f"left: {left}"
    if (capture / "meta.json").exists():
        recover = [*PAGELENS, "recover", str(capture)]
        done = subprocess.run(recover, capture_output=True, text=True, env=ENV, check=False)
        if done.returncode:
            return mode, f"recover: {done.stderr.strip()}"
    return mode, ""


def main() -> int:
    """All trials."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="pagelens-kills-") as name:
        work = Path(name)
        work.chmod(0o755)
        alone, confined = work / "alone", work / "confined"
        source = Path(__file__).parent.parent / "tests/support/subjects/confined.c"
        subprocess.run(["gcc", "-O1", "-o", confined, source], check=True)
        subprocess.run([PYTHON, "-c", PROGRAM, str(alone), str(work / "p")], check=True)
        modes: Counter[str] = Counter()
        harmed = 0
        for n in range(trials):
            mode, harm = trial(work, n, rng, alone.read_text(), confined)
            modes[mode.partition(" --snapshot")[0]] += 1
            if harm:
                harmed += 1
                print(f"{mode}: {harm}", flush=True)
    print(f"{trials} kills, seed {seed}: {harmed} harmed; {', '.join(f'{m} {c}' for m, c in modes.items())}")
    return 1 if harmed else 0


if __name__ == "__main__":
    sys.exit(main())
