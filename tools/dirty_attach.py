"""Attach to and detach from real programs, many times: python tools/dirty_attach.py TIMES [NAME…].

Targets: steady (tests/support/subjects/steady.c: registers, timers, signals, thread churn, timed waits), node,
java, redis (under redis-benchmark, with a digest of its data before and after); kill: SIGKILL of `pagelens
dirty` at TIMES random moments on steady. After each series: the program's own checks, TracerPid 0, no uw in
VmFlags, text as in its files, descriptors as before. Results are recorded in docs/dirty.md.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from pagelens.cli.main import main  # noqa: E402 (the path comes first)
from pagelens.dirty.track import track  # noqa: E402
from pagelens.vm.errors import CapabilityMissingError  # noqa: E402
from support.subjects import Subjects  # noqa: E402
from support.unharmed import Steady, assert_untouched  # noqa: E402

NODE = """
let s=0, n=0;
setInterval(()=>{ let a=[]; for(let i=0;i<2e4;i++){a.push({i}); s+=i;} n++; Buffer.alloc(2e5,n&255); },1);
setInterval(()=>{ if (s !== n*(2e4*(2e4-1)/2)) { console.log('WRONG'); process.exit(9); } }, 10);
"""
JAVA = """
public class Busy {
    static volatile long rounds;
    public static void main(String[] a) throws Exception {
        for (int t = 0; t < 3; t++) new Thread(() -> {
            while (true) {
                long s = 0; byte[][] b = new byte[64][];
                for (int i = 0; i < 20000; i++) { s += i; b[i % 64] = new byte[512]; }
                if (s != 199990000L) { System.out.println("WRONG"); Runtime.getRuntime().halt(9); }
                rounds++;
                try { Thread.sleep(1); } catch (InterruptedException e) { Runtime.getRuntime().halt(9); }
            }
        }).start();
        Thread.currentThread().join();
    }
}
"""


def fds(pid: int) -> int:
    """Descriptors of a process that are userfaultfds."""
    return sum("userfaultfd" in str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())


def series(name: str, pid: int, times: int, alive: Callable[[], None]) -> None:
    """`times` of attach, one look, detach; then the checks."""
    costs, refused = [], 0
    for i in range(times):
        begin = time.perf_counter()
        try:
            tracker = track(pid=pid)
        except CapabilityMissingError as error:
            refused += 1
            last = str(error)
            continue
        costs.append(time.perf_counter() - begin)
        tracker.epoch()
        tracker.close()
        if i % 50 == 0:
            alive()
    alive()
    assert_untouched(pid)
    assert fds(pid) == 0
    costs.sort()
    tail = f", {refused} refused ({last})" if refused else ""
    print(
        f"{name}: {len(costs)} times attached; median {costs[len(costs) // 2] * 1e3:.2f} ms, "
        f"worst {costs[-1] * 1e3:.1f} ms; unharmed{tail}",
        flush=True,
    )


@contextmanager
def program(command: list[str], warm: float) -> Iterator[subprocess.Popen[bytes]]:
    """A child, killed at the end."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(warm)
        yield child
    finally:
        child.kill()
        child.wait()


def lives(child: subprocess.Popen[bytes]) -> Callable[[], None]:
    """A check that it has not ended."""

    def check() -> None:
        assert child.poll() is None, f"ended with {child.returncode}"

    return check


def run_steady(times: int, directory: Path) -> None:
    with Steady(Subjects(directory)("steady")) as target:
        series("steady", target.pid, times, lambda: (target.check(), None)[1])
        target.goes_on()


def run_node(times: int, directory: Path) -> None:  # noqa: ARG001 (one signature for all)
    with program(["node", "-e", NODE], 0.5) as child:
        series("node", child.pid, times, lives(child))


def run_java(times: int, directory: Path) -> None:
    (directory / "Busy.java").write_text(JAVA)
    with program(["java", "-Xmx256m", str(directory / "Busy.java")], 4) as child:
        series("java", child.pid, times, lives(child))


def run_redis(times: int, directory: Path) -> None:
    socket = str(directory / "redis.sock")
    cli = ["redis-cli", "-s", socket]
    with program(["redis-server", "--port", "0", "--unixsocket", socket, "--save", ""], 0.5) as child:
        subprocess.run([*cli, "debug", "populate", "100000", "key", "100"], check=True, capture_output=True)
        before = subprocess.run([*cli, "debug", "digest"], check=True, capture_output=True).stdout
        load = subprocess.Popen(
            ["redis-benchmark", "-s", socket, "-l", "-q", "-t", "ping,get", "-c", "4"],
            stdout=subprocess.DEVNULL,
        )
        try:
            series("redis under load", child.pid, times, lives(child))
        finally:
            load.kill()
            load.wait()
        after = subprocess.run([*cli, "debug", "digest"], check=True, capture_output=True).stdout
        assert before == after, (before, after)


def run_kill(times: int, directory: Path) -> None:
    rng = random.Random(6)
    with Steady(Subjects(directory)("steady")) as target:
        three = ["dirty", "--interval", "0.005", "--count", "3", str(target.pid), "-o", os.devnull, "--force"]
        main(three)  # the imports
        begin = time.perf_counter()
        main(three)
        once = time.perf_counter() - begin  # attach, three looks, detach: moments are spread over as much
        reached = 0
        for _ in range(times):
            ready, told = os.pipe()
            child = os.fork()
            if not child:  # forked, not started anew: a busy machine would spend most moments on imports
                os.dup2(told, 1)
                os._exit(main(["dirty", "--interval", "0.005", "--format", "json", str(target.pid)]))
            os.close(told)
            time.sleep(rng.random() * once)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reached += bool(os.read(ready, 1))
            os.close(ready)
            target.check()
            assert_untouched(target.pid)
        target.goes_on()
        leaked = fds(target.pid)
    print(
        f"kill: {times} times killed at random moments, {reached} of them after the first look; unharmed; "
        f"unused descriptors left {leaked}",
        flush=True,
    )


def run() -> int:
    times = int(sys.argv[1])
    runs = {"steady": run_steady, "node": run_node, "java": run_java, "redis": run_redis, "kill": run_kill}
    with tempfile.TemporaryDirectory() as directory:
        for name in sys.argv[2:] or list(runs):
            binary = {"node": "node", "java": "java", "redis": "redis-server"}.get(name, "gcc")
            if shutil.which(binary) is None:
                print(f"{name}: not installed, not run", flush=True)
                continue
            runs[name](times, Path(directory))
    return 0


if __name__ == "__main__":
    sys.exit(run())
