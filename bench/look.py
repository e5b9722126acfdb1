"""`map` and `pages` of a process with 16 GiB reserved and 1 GiB resident, against a C loop over the same
files.

Both sides run in turn in one go, fastest of N each, in CPU time (on a busy machine the wall clock measures
others) and in wall time. The library does what the command does between its start and its printing (naming
regions included). The whole command is timed too: the difference is the start of Python and the printing.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pagelens.cli import map as map_command
from pagelens.cli import pages as pages_command
from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process

HERE = Path(__file__).resolve().parent
REPEAT = 7


def library_map(pid: int) -> None:
    """What `pagelens map PID` does before it prints."""
    shot, found, _ = map_command.look(pid)
    map_command.region_rows(shot, found)


def library_pages(pid: int) -> None:
    """What `pagelens pages PID` does before it prints."""
    with Process.open(pid) as proc:
        shot = snapshot.take(proc, accounting=False)
        found, _ = regions.regions(proc, shot.vmas)
    assert shot.pages is not None
    pages_command.run_rows(shot.pages, found)


def command(*args: str) -> tuple[float, float]:
    """CPU and wall milliseconds of a whole command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "pagelens.cli.main", *args], capture_output=True, check=True)
    wall, after = (time.perf_counter() - start) * 1e3, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu * 1e3, wall


def main() -> int:
    """Print the ratios."""
    with tempfile.TemporaryDirectory() as directory:
        peer = Path(directory) / "look_peer"
        subprocess.run(["gcc", "-O2", "-o", str(peer), str(HERE / "look_peer.c")], check=True)
        child = subprocess.Popen([str(peer), "hold"], stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            pid = int(child.stdout.readline())
            print(f"{'':8}{'':6}{'C loop':>12}{'pagelens':>12}{'ratio':>8}{'command':>12}")
            for name, ours in (("map", library_map), ("pages", library_pages)):
                rows: dict[str, list[tuple[float, float, float]]] = {"CPU": [], "wall": []}
                for _ in range(REPEAT):
                    out = subprocess.run(
                        [str(peer), name, str(pid), "1"], capture_output=True, text=True, check=True
                    )
                    wall_c, cpu_c = (float(x) / 1e3 for x in out.stdout.split()[:2])
                    cpu, wall = time.process_time(), time.perf_counter()
                    ours(pid)
                    cpu, wall = (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3
                    whole = command(name, str(pid))
                    rows["CPU"].append((cpu_c, cpu, whole[0]))
                    rows["wall"].append((wall_c, wall, whole[1]))
                for clock, values in rows.items():
                    c, p, w = (min(column) for column in zip(*values, strict=True))
                    print(f"{name:8}{clock:6}{c:>9.1f} ms{p:>9.1f} ms{p / c:>8.2f}{w:>9.0f} ms")
        finally:
            child.kill()
            child.wait()
    helps = [command("--help") for _ in range(REPEAT)]
    cpu, wall = (min(column) for column in zip(*helps, strict=True))
    print(f"pagelens --help: {cpu:.0f} ms CPU, {wall:.0f} ms wall")
    return 0


if __name__ == "__main__":
    sys.exit(main())
