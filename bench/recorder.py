"""What recording costs the recorded program, against perf in the same run.

Each figure is user+system time of the program's own work (it measures itself, so that start-up and our own
processes do not count), the median of several interleaved rounds: on a busy machine wall time says
little.

  ./dev bench recorder            (about six minutes)
  python bench/recorder.py 3 faults summary      rounds, and only these parts
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAULTS = 262_144
PAGELENS = [sys.executable, "-m", "pagelens.cli.main"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
Command = list[str]


def used(command: Command) -> float:
    """Microseconds that the subject reports."""
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    found = re.search(r"^used (\d+)$", done.stderr, re.MULTILINE)
    if not found:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-500:]}")
    return float(found[1])


def middle(variants: dict[str, Command], rounds: int) -> dict[str, float]:
    """The median of `rounds` interleaved measurements of each."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, command in variants.items():
            found[name].append(used(command))
    return {name: statistics.median(values) for name, values in found.items()}


class Bench:
    """Paths, and the two recorders as prefixes of a command."""

    def __init__(self, work: Path, rounds: int) -> None:
        self.work, self.rounds = work, rounds
        self.subject = str(work / "subject")
        subprocess.run(
            ["gcc", "-O2", "-pthread", "-o", self.subject, ROOT / "bench/subjects/recorder.c"], check=True
        )
        self.capture = str(work / "c.plens")

    def ours(self, *args: str) -> Command:
        """`pagelens run` without a summary, into the same capture each time."""
        return [*PAGELENS, "run", "-q", "--force", "-c", self.capture, "--snapshot", "none", *args, "--"]

    def perf(self, events: str, *args: str) -> Command:
        """`perf record` of every event, with addresses and a large buffer."""
        out = str(self.work / "perf.data")
        return ["perf", "record", "-q", "-o", out, "-m", "8M", "-e", events, "-c", "1", "-d", *args]

    def faults(self) -> None:
        """Added time of 262,144 first-touch faults."""
        work = [self.subject, "faults", str(FAULTS)]
        entries = "exceptions:page_fault_user,exceptions:page_fault_kernel"
        completed = "minor-faults,major-faults"
        variants = {
            "alone": work,
            "perf page-faults": [*self.perf("page-faults"), *work],
            "lean": [*self.ours("--detail", "lean"), *work],
            "perf completed, entries": [*self.perf(f"{completed},{entries}"), *work],
            "perf completed, stacks": [*self.perf(completed, "-g"), *work],
            "perf completed, entries, stacks": [*self.perf(f"{completed},{entries}", "-g"), *work],
            "normal": [*self.ours("--detail", "normal"), *work],
        }
        # What is added is a tenth of the whole: few rounds are chance.
        best = middle(variants, 4 * self.rounds)
        alone = best.pop("alone")
        print(f"## {FAULTS:,} first-touch faults: {alone / 1000:.0f} ms alone; added:")
        for name, value in best.items():
            print(
                f"   {name:34s} {(value - alone) / 1000:7.0f} ms  {(value - alone) * 1000 / FAULTS:6.0f} ns a fault"
            )
        lean = (best["lean"] - alone) / (best["perf page-faults"] - alone)
        normal = (best["normal"] - alone) / (best["perf completed, entries, stacks"] - alone)
        print(f"   lean / perf record -e page-faults -c 1 -d: {lean:.2f} (asked: at most 1)")
        print(
            f"   normal / perf of the same fields (completed, entries, stacks): {normal:.2f} (asked: at most 1)"
        )
        for detail in ("lean", "normal"):
            summary = self.work / "s.json"
            command = [*self.ours("--detail", detail, "--summary-json", str(summary)), *work]
            subprocess.run(command, check=True, capture_output=True, env=ENV)
            faults = json.loads(summary.read_text())["faults"]
            lost, rest = faults["lost"], faults["unexplained"]
            print(f"   {detail}: recorded {faults['recorded']:,}, lost {lost}, unexplained {rest}")

    def others(self) -> None:
        """Added time per fork, thread, switch and call, for the tree and for those who are not recorded."""
        print("## added per operation (user+system, of the program and its children)")
        for what, count, unit in (
            ("forks", 2000, "fork, exit and wait"),
            ("threads", 4000, "thread, create and join"),
            ("switches", 20000, "round trip of two processes"),
            ("calls", 500000, "system call that is not kept"),
        ):
            work = [self.subject, what, str(count)]
            variants = {
                "alone": work,
                "lean": [*self.ours("--detail", "lean"), *work],
                "normal": [*self.ours("--detail", "normal"), *work],
            }
            best = middle(variants, 2 * self.rounds)
            holder = subprocess.Popen(
                [*self.ours("--detail", "normal"), "sleep", "60"], stderr=subprocess.DEVNULL, env=ENV
            )
            time.sleep(2)
            best["bystander"] = middle({"x": work}, 2 * self.rounds)["x"]
            holder.terminate()
            holder.wait()
            added = {k: (v - best["alone"]) / count for k, v in best.items() if k != "alone"}
            figures = ", ".join(f"{k} {v:+.2f} µs" for k, v in added.items())
            print(f"   {unit:30s} {best['alone'] / count:7.2f} µs alone; {figures}")

    def cpu_bound(self) -> None:
        """A program that only computes."""
        work = [self.subject, "spin", "8"]
        best = middle({"alone": work, "normal": [*self.ours(), *work]}, self.rounds)
        share = best["normal"] / best["alone"] - 1
        print(f"## CPU-bound, {best['alone'] / 1e6:.1f} s: {100 * share:+.2f} % (asked: under 1 %)")

    def to_summary(self) -> None:
        """One million recorded faults to the printed summary, against perf script."""
        million = [self.subject, "faults", "1000000"]
        end = self.work / "end"
        timed = ["sh", "-c", f"{self.subject} faults 1000000; touch {end}"]
        recording = peak([*self.ours(), *timed])
        wait = time.time() - end.stat().st_mtime
        kept = [cost([*PAGELENS, "summary", self.capture]) for _ in range(3)]
        # What the recorder did after the program's end, once more and from nothing: as for one that was killed.
        cold = []
        for _ in range(3):
            shutil.rmtree(Path(self.capture) / "derived")
            cold.append(cost([*PAGELENS, "summary", self.capture]))
        # The fields that our events have: both kinds of fault, CPU, address, stack; printed with symbols.
        peer = self.perf("minor-faults,major-faults", "--sample-cpu", "-g")
        subprocess.run([*peer, *million], check=True, capture_output=True)
        fields = "comm,pid,tid,cpu,time,event,addr,ip,sym"
        data = str(self.work / "perf.data")
        script = min(cost(["perf", "script", "-F", fields, "-i", data])[0] for _ in range(3))
        print(
            "## 1,000,000 faults to the printed summary, least CPU time of 3 (asked: under 5 s and 500 MiB)"
        )
        for name, figures in (
            ("kept by the recording (run -q)", kept),
            ("from the events (a killed recorder)", cold),
        ):
            best = min(seconds for seconds, _ in figures)
            most = max(memory for _, memory in figures)
            print(
                f"   {name:36s} {best:.3f} s, {most} MiB; perf script / this: {script / best:.1f} (asked: 10)"
            )
        print(f"   perf script of as many: {script:.2f} s")
        print(
            f"   run -q itself: peak {recording} MiB; from the program's end to run's: {wait:.2f} s on the wall"
        )


def cost(command: Command) -> tuple[float, int]:
    """(seconds of user+system time, peak MiB) of a command whose output is dropped."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: {child.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10


def peak(command: Command) -> int:
    """Peak MiB of a command itself, without its children (whose peak wait4 would give)."""
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV) as child:
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            found = re.search(r"^VmHWM:\s*(\d+)", status, re.MULTILINE)
            most = max(most, int(found[1]) >> 10 if found else 0)
            time.sleep(0.02)
    return most


def main() -> None:
    """Everything, into a directory that is removed."""
    if not shutil.which("perf"):
        raise SystemExit("perf is not installed")
    work = Path(tempfile.mkdtemp(prefix="pagelens-bench-"))
    try:
        bench = Bench(work, int(sys.argv[1]) if len(sys.argv) > 1 else 5)
        parts = {
            "faults": bench.faults,
            "others": bench.others,
            "cpu": bench.cpu_bound,
            "summary": bench.to_summary,
        }
        for name in sys.argv[2:] or parts:
            parts[name]()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
