"""Attach to a busy program and detach, again and again, and see that it does not notice.

  python tools/recorder_attach.py [TIMES] [PROGRAM…]     (default: 200 churn; exit code 1 on harm)

The program (tests/support/subjects/churn.c) makes and joins threads all the time while queued signals with values
arrive; at its end it says how many came, and their sum. Each recording's equation must come out, too: nothing
unexplained, and lost at most the faults that were being handled while a thread was marked.

A series that takes longer than PAGELENS_LIMIT seconds (300) stops there; the line says how many were done.

Other programs: redis (under redis-benchmark; its own digest of the keys before and after), jvm and node (threads that
compute a checksum which is known), storm (tests/support/subjects/fork_storm.c: each of its children checks its memory;
the tree is attached to).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = float(os.environ.get("PAGELENS_LIMIT", "300"))
sys.path.insert(0, str(ROOT / "src"))

from pagelens.capture.attach import attach  # noqa: E402 - after the path is set
from pagelens.capture.session import Settings  # noqa: E402 - likewise

JAVA = """
import java.util.*;
public class Sum { public static void main(String[] a) throws Exception {
  System.out.println("ready"); System.out.flush(); long rounds = 0, sum = 0;
  while (System.in.available() == 0) { rounds++; long[] part = new long[3]; Thread[] t = new Thread[3];
    for (int k = 0; k < 3; k++) { int n = k; t[k] = new Thread(() -> { byte[][] b = new byte[200][];
      for (int i = 0; i < 200; i++) { b[i] = new byte[4096]; Arrays.fill(b[i], (byte) (n + 1)); }
      for (byte[] x : b) for (byte y : x) part[n] += y; }); t[k].start(); }
    for (int k = 0; k < 3; k++) { t[k].join(); sum += part[k]; } }
  System.out.println(rounds * 819200L * 6 + " " + sum); } }
"""
NODE = """
const { Worker } = require('worker_threads');
const code = `const { parentPort: p } = require('worker_threads'); p.on('message', n => {
  const b = Array.from({ length: 100 }, () => Buffer.alloc(4096, n)); let s = 0;
  for (const x of b) for (const y of x) s += y; p.postMessage(s); });`;
let rounds = 0, sum = 0, stop = false;
const w = [1, 2].map(() => new Worker(code, { eval: true }));
w.forEach((x, i) => { x.on('message', s => { sum += s; rounds += i + 1;
  if (stop) x.terminate(); else x.postMessage(i + 1); }); x.postMessage(i + 1); });
process.stdin.on('data', () => { stop = true; process.stdin.pause(); });
process.on('exit', () => console.log(rounds * 409600 + ' ' + sum));
console.log('ready');
"""


def attach_often(work: Path, pid: int, times: int, *, tree: bool = False) -> tuple[int, int, int, int]:
    """(number done, events, lost, unexplained) of up to `times` recordings."""
    until = time.monotonic() + LIMIT
    count = events = lost = unexplained = 0
    for n in range(times):
        if time.monotonic() > until:
            break
        settings = Settings(snapshot="none", detail=("lean", "normal", "full")[n % 3])
        done = attach(work / "c.plens", settings, pid, tree=tree, duration=0.02, force=True)
        events += json.loads((work / "c.plens/meta.json").read_text())["rows"]
        lost += done.summary["faults"]["lost"]
        unexplained += abs(done.summary["faults"]["unexplained"])
        count += 1
    return count, events, lost, unexplained


def traced(pid: int) -> bool:
    """Whether somebody traces one of its threads."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            if "TracerPid:\t0" not in (task / "status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread is gone
    return False


def other(name: str, work: Path, times: int) -> int:
    """jvm, node or redis; 1 on harm."""
    if name in ("redis", "storm"):
        return redis(work, times) if name == "redis" else storm(work, times)
    source = work / ("Sum.java" if name == "jvm" else "sum.js")
    source.write_text(JAVA if name == "jvm" else NODE)
    command = ["java", "-Xmx128m", str(source)] if name == "jvm" else ["node", str(source)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            count, events, lost, unexplained = attach_often(work, child.pid, times)
            held = traced(child.pid)
            out, _ = child.communicate("\n", timeout=60)
        finally:
            child.kill()  # it does not end by itself when its input is closed
    expected, got = out.split()
    harm = held or child.returncode or expected != got or unexplained
    return say(name, count, events, lost, unexplained, f"checksum {got} of {expected}", bool(harm))


def storm(work: Path, times: int) -> int:
    """Processes that come and go, with the tree."""
    program = work / "storm"
    source = ROOT / "tests/support/subjects/fork_storm.c"
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, source], check=True)
    with subprocess.Popen([str(program)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        count, events, lost, unexplained = attach_often(work, child.pid, times, tree=True)
        held = traced(child.pid)
        child.send_signal(signal.SIGINT)
        code = child.wait(60)
    harm = held or code or unexplained
    return say("storm", count, events, lost, unexplained, f"exit code {code}", bool(harm))


def redis(work: Path, times: int) -> int:
    """A server under load of other keys: the digest of its own keys must stay."""
    port = str(40_000 + os.getpid() % 20_000)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = ["--port", port, "--dir", str(work), "--save", ""]
    server = subprocess.Popen(["redis-server", *options], **quiet)  # type: ignore[call-overload]

    def ask(*words: str) -> str:
        done = subprocess.run(["redis-cli", "-p", port, *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        while ask("ping") != "PONG":
            time.sleep(0.05)
        keys = [word for n in range(1000) for word in (f"mine:{n}", "x" * n)]
        ask("mset", *keys)
        before = ask("debug", "digest-value", *keys[::2])
        load = ["redis-benchmark", "-p", port, "-t", "set,lpush,lpop", "-d", "2000", "-r", "9999", "-l", "-q"]
        bench = subprocess.Popen(load, **quiet)  # type: ignore[call-overload]
        try:
            count, events, lost, unexplained = attach_often(work, server.pid, times)
            held = traced(server.pid)
            ran = bench.poll() is None
        finally:
            bench.kill()
            bench.wait()
        same = bool(before) and ask("debug", "digest-value", *keys[::2]) == before
        alive = ask("ping") == "PONG"
    finally:
        server.terminate()
        server.wait()
    harm = held or not ran or not same or not alive or unexplained
    return say(
        "redis", count, events, lost, unexplained, f"digest {'same' if same else 'differs'}", bool(harm)
    )


def say(name: str, times: int, events: int, lost: int, unexplained: int, what: str, harm: bool) -> int:
    """One line; 1 on harm."""
    verdict = "HARM" if harm else "unharmed"
    print(
        f"{name}: {times} attaches: {what}, events {events:,}, lost {lost}, unexplained {unexplained}: {verdict}"
    )
    return int(harm)


def main() -> int:
    """All programs that are asked for."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    bad = 0
    for name in sys.argv[2:] or ["churn"]:
        with tempfile.TemporaryDirectory(prefix="pagelens-attach-") as work:
            bad |= churn(times) if name == "churn" else other(name, Path(work), times)
    return bad


def churn(times: int) -> int:
    """Threads that come and go, and queued signals."""
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
