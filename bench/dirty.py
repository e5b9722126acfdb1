"""Dirty tracking: a look at 1 GiB against the same ioctl loop in C; attach; cost of a first write by backend; a
program's slowdown; the pre-copy forecast against an actual pre-copy.

Peer and pagelens run in turn in one go, fastest of N each, in CPU time of this process (on a busy machine the
wall clock measures others).
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from pagelens.dirty import forecast, spans  # noqa: E402 (the path comes first)
from pagelens.dirty.track import Tracker, track  # noqa: E402
from pagelens.linux.memory import read_into  # noqa: E402
from support.subjects import Subjects  # noqa: E402

PAGE = 4096
GIB = 1 << 30


def anonymous(size: int) -> np.ndarray:
    """A mapping of its own without huge pages, all of it written."""
    area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(15)  # MADV_NOHUGEPAGE
    array = np.frombuffer(area, np.uint8)
    array[::PAGE] = 1
    return array


def best(repeat: int, prepare: Callable[[], None], *timed: Callable[[], object]) -> list[float]:
    """Fastest CPU seconds of each of `timed`, in turn, each after `prepare`."""
    out = [float("inf")] * len(timed)
    for _ in range(repeat):
        for i, what in enumerate(timed):
            prepare()
            begin = time.process_time()
            what()
            out[i] = min(out[i], time.process_time() - begin)
    return out


def looks(directory: Path) -> None:
    """A look at 1 GiB: clean, 1 % dirty at random, all dirty."""
    library = directory / "peer.so"
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "dirty_peer.c")], check=True
    )
    peer = ctypes.CDLL(str(library)).peer_epoch
    peer.argtypes = (ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)
    peer.restype = ctypes.c_long
    array = anonymous(GIB)
    start, rng = array.ctypes.data, np.random.default_rng(1)
    few = rng.choice(GIB // PAGE, GIB // PAGE // 100, replace=False) * PAGE

    def write_few() -> None:
        array[few] += 1

    def write_all() -> None:
        array[::PAGE] += 1

    print("| 1 GiB | C loop | pagelens | ratio (limit 1.2) |\n|---|---|---|---|")
    with track(a=array) as tracker, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for name, prepare, repeat in (
            ("clean", lambda: None, 40),
            ("1 % dirty", write_few, 25),
            ("all dirty", write_all, 5),
        ):
            tracker.epoch()
            c, python = best(
                repeat,
                prepare,
                lambda: peer(pagemap.fileno(), start, start + GIB),
                tracker.epoch,
            )
            print(f"| {name} | {c * 1e3:.2f} ms | {python * 1e3:.2f} ms | {python / c:.2f} |")


def small() -> None:
    """A look at 1 MiB, for callers at 1 kHz."""
    array = anonymous(1 << 20)
    with track(a=array) as tracker:

        def one() -> None:
            for i in range(200):
                array[i * PAGE] += 1
                tracker.epoch()

        (cost,) = best(5, lambda: None, one)
    print(f"\nOne page written and one look at 1 MiB: {cost / 200 * 1e6:.0f} µs of CPU time.")


def attach(directory: Path) -> None:
    """Attach to a small program and to one of 1 GiB."""
    puppet = str(Subjects(directory)("puppet"))
    code = "import time\nb=bytearray(1<<30)\nb[::4096]=b'1'*(1<<18)\nprint('x',flush=True)\ntime.sleep(99)"
    print("\n| attach to | fastest | median |\n|---|---|---|")
    for name, command in (
        ("a small C program", [puppet]),
        ("Python with 1 GiB", [sys.executable, "-c", code]),
    ):
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert child.stdout
            child.stdout.readline()
            times = []
            for _ in range(25):
                begin = time.perf_counter()
                tracker = track(pid=child.pid)
                times.append(time.perf_counter() - begin)
                tracker.close()
            times.sort()
            print(f"| {name} | {times[0] * 1e3:.2f} ms | {times[12] * 1e3:.2f} ms |")
        finally:
            child.kill()
            child.wait()


def first_write() -> None:
    """Cost of the first write to a page in an epoch, and of the look, by backend."""
    print("\n| backend | first write to a page | look, 16,384 pages all dirty |\n|---|---|---|")
    for backend in ("none", "pagescan", "mprotect", "uffd-sync"):
        array = anonymous(64 << 20)
        tracker = None if backend == "none" else track(backend=backend, a=array)
        times, costs = [], []
        for _ in range(7):
            begin = time.perf_counter()
            array[::PAGE] += 1
            times.append(time.perf_counter() - begin)
            if tracker is not None:
                costs.append(tracker.epoch().cost_ns / 1e6)
        if tracker is not None:
            tracker.close()
        look = f"{min(costs):.2f} ms" if costs else "-"
        print(f"| {backend} | {min(times) / (array.nbytes // PAGE) * 1e6:.2f} µs | {look} |")


WRITER = """
import sys, time, mmap, numpy as np
m = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m.madvise(15)
a = np.frombuffer(m, np.uint8); a[::4096] = 1
rng = np.random.default_rng(2); at = rng.integers(0, 64 << 20, 1 << 20)
print("x", flush=True)
for line in sys.stdin:
    begin = time.process_time()
    for i in range(12): a[at] += 1
    print(time.process_time() - begin, flush=True)
"""


def slowdown() -> None:
    """A program that writes at random all over 64 MiB, without tracking and with 10 looks a second."""
    child = subprocess.Popen([sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin
    assert child.stdout
    child.stdout.readline()

    def job(tracker: Tracker | None) -> float:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b"go\n")
        child.stdin.flush()
        import select

        while not select.select([child.stdout], [], [], 0.1)[0]:
            if tracker is not None:
                tracker.epoch()
        return float(child.stdout.readline())

    plain, watched = [], []
    for _ in range(4):
        plain.append(job(None))
        with track(pid=child.pid) as tracker:
            watched.append(job(tracker))
    child.kill()
    child.wait()
    print(
        f"\nA program that writes at random over 64 MiB: {min(plain):.2f} s of its CPU time alone,"
        f" {min(watched):.2f} s with 10 looks a second: {min(watched) / min(plain):.2f} times."
    )


# Programs for the forecast: a body that runs again and again over `a`, 128 MiB.
START = """
import sys, time, mmap, numpy as np
m = mmap.mmap(-1, 128 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m.madvise(15)
a = np.frombuffer(m, np.uint8); a[::4096] = 1
rng = np.random.default_rng(4); print("x", flush=True); n = 0
while True:
    n += 1
"""
PROGRAMS = {
    "hot and cold": """
    a[rng.integers(0, 300, 40) * 4096] += 1
    a[rng.integers(0, 128 << 8, 25) * 4096] += 1
    time.sleep(0.002)
""",
    "a slow sweep": """
    at = n * 20 % 32000; a[at * 4096:(at + 20) * 4096:4096] += 1
    time.sleep(0.002)
""",
    "bursts": """
    if n % 100 == 0: a[rng.integers(0, 128 << 8, 3000) * 4096] += 1
    a[rng.integers(0, 50, 10) * 4096] += 1
    time.sleep(0.002)
""",
    "all over": """
    a[rng.integers(0, 128 << 8, 2000) * 4096] += 1
    time.sleep(0.002)
""",
}


def precopy(bandwidth: float = 200e6, pause: float = 0.02) -> None:
    """For each program: forecast from 100 looks as far apart as the pause, then five actual pre-copies; and how
    many of them are as told (a verdict says "may" of what some do)."""
    print(f"\nPre-copy of 128 MiB at {bandwidth / 1e6:.0f} MB/s, pause {pause * 1e3:.0f} ms:\n")
    print("| program | forecast | actual: rounds, MiB, downtime | as told |\n|---|---|---|---|")
    for name, body in PROGRAMS.items():
        child = subprocess.Popen([sys.executable, "-c", START + body], stdout=subprocess.PIPE)
        try:
            assert child.stdout
            child.stdout.readline()
            with track(pid=child.pid) as tracker:
                epochs = list(tracker.epochs(pause, 100))
                cost = [e.cost_ns / 1e9 for e in epochs]
                curve = forecast.curve(
                    [e.spans for e in epochs],
                    [e.span_ns / 1e9 for e in epochs],
                    tracker.contents().pages,
                    cost,
                )
                told = forecast.forecast(curve, bandwidth, pause)
                actual = [_actual(child.pid, tracker, bandwidth, pause) for _ in range(5)]
        finally:
            child.kill()
            child.wait()
        fits = {"converges": (True,), "does not converge": (False,), "may converge": (True, False)}[
            told.verdict
        ]
        right = sum((down <= pause) in fits for _, _, down in actual)
        shown = "; ".join(f"{rounds}, {sent:.0f}, {down * 1e3:.1f} ms" for rounds, sent, down in actual)
        print(
            f"| {name} | {told.text().partition('; ')[0]} | {shown} | {right} of {len(actual)} |", flush=True
        )


def _actual(pid: int, tracker: Tracker, bandwidth: float, pause: float) -> tuple[int, float, float]:
    # One pre-copy: each round lasts as long as its pages take, and the look after it.
    tracker.epoch()
    rounds, pages, down = [], tracker.contents(), 0.0
    while True:
        seconds = pages.pages * PAGE / bandwidth
        if (rounds and seconds + down <= pause) or len(rounds) >= forecast.MAX_ROUNDS:
            break
        rounds.append(pages.pages)
        begin = time.monotonic()
        send(pid, pages)
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
        epoch = tracker.epoch()
        pages, down = epoch.spans, epoch.cost_ns / 1e9
    sent = (sum(rounds) + pages.pages) * PAGE / 2**20
    return len(rounds), sent, seconds + down


def send(pid: int, pages: spans.Spans) -> None:
    """Read the pages, as a migration would."""
    buffer = np.empty(1 << 20, np.uint8)
    for start, end in pages.pairs():
        for at in range(start, end, len(buffer)):
            read_into(pid, at, buffer[: min(len(buffer), end - at)])


def main() -> None:
    """All tables, or those that are named: looks, small, attach, first_write, slowdown, precopy."""
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        tables: dict[str, Callable[[], None]] = {
            "looks": lambda: looks(Path(directory)),
            "small": small,
            "attach": lambda: attach(Path(directory)),
            "first_write": first_write,
            "slowdown": slowdown,
            "precopy": precopy,
        }
        for name in chosen or tables:
            tables[name]()


if __name__ == "__main__":
    main()
