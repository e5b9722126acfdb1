"""Speed of the model against its floor in the same run: a Python loop that only calls a function, and numpy
moving as many bytes as a page's state has. Ratios travel between machines; figures a second do not.

    ./dev bench model
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from pagelens.model import Machine, Process

PAGE = 4096
GIB = 1 << 30
PAGES = GIB // PAGE
RW, R, PRIV = 3, 1, 0x22
SINGLE = 50_000


def clock(work: Callable[[], object], times: int = 1) -> float:
    """CPU seconds (other programs may run beside): the best of `times`."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def line(name: str, count: int, seconds: float, floor: float, target: float, of: str) -> None:
    """One row: rate, the ratio to the floor (how many times slower), the target of the issue."""
    rate = count / seconds
    verdict = "" if not target else ("ok" if rate >= target else "BELOW TARGET")
    print(f"{name:38} {rate:15,.0f} /s   {seconds / count / floor:8.1f} x {of:12} {verdict}")


def batched() -> None:
    """1 GiB of pages in columns. The floor is a copy of their 8-byte entries."""
    source = np.ones(PAGES, np.uint64)
    sink = np.zeros(PAGES, np.uint64)

    def copy() -> None:
        sink[:] = source

    floor = clock(copy, 9) / PAGES
    machine = Machine("linux-6.18")
    p = machine.spawn()
    a = p.mmap(0, GIB, RW, PRIV)

    best: dict[str, float] = {}
    targets: dict[str, float] = {}

    def row(name: str, work: Callable[[], object], target: float = 50e6) -> None:
        best[name] = min(best.get(name, float("inf")), clock(work))
        targets[name] = target

    row("touch, model's own memory cold", lambda: p.access(a, GIB, "w"), 0)
    family: list[Process] = []
    for _ in range(4):
        p.madvise(a, GIB, 4)
        row("touch", lambda: p.access(a, GIB, "w"))
        row("fork", lambda: family.append(p.fork()))
        row("mprotect to read-only", lambda: p.mprotect(a, GIB, R))
        row("mprotect to writable", lambda: p.mprotect(a, GIB, RW))
        row("copy-on-write in the child", lambda: family[0].access(a, GIB, "w"), 1e6)
        row("reuse in the parent", lambda: p.access(a, GIB, "w"), 1e6)
        family.pop().exit()
        row("DONTNEED", lambda: p.madvise(a, GIB, 4))
        row("populate", lambda: p.madvise(a, GIB, 23))
        row("write again, no fault", lambda: p.access(a, GIB, "w"), 1e6)
        row("pagemap", lambda: p.pagemap(a, PAGES), 1e6)
        row("snapshot: vmas, pages, smaps", p.snapshot, 1e6)
        p.madvise(a, GIB, 4)
        row("read zero pages", lambda: p.access(a, GIB, "r"))
    for name, seconds in best.items():
        line(name, PAGES, seconds, floor, targets[name], "entry copy")


def object_interface() -> None:
    """One call an operation. The floor is a Python method that does nothing."""

    class Nothing:
        def call(self, addr: int, length: int, kind: str) -> None:
            pass

    nothing = Nothing()

    def empty() -> None:
        for i in range(SINGLE):
            nothing.call(i * PAGE, 1, "w")

    floor = clock(empty, 5) / SINGLE
    p = Machine("linux-6.18").spawn()
    a = p.mmap(0, SINGLE * 2 * PAGE, RW, PRIV)

    def faults() -> None:
        for i in range(SINGLE):
            p.access(a + i * PAGE, 1, "w")

    def pairs() -> None:
        for _ in range(SINGLE // 2):
            p.munmap(p.mmap(0, 4 * PAGE, R, PRIV), 4 * PAGE)

    def splits() -> None:
        for i in range(SINGLE // 2):
            p.mprotect(a + 4 * i * PAGE, PAGE, R)

    def zap() -> None:
        p.madvise(a, SINGLE * 2 * PAGE, 4)

    cold = min((zap(), clock(faults))[1] for _ in range(3))
    line("single faults", SINGLE, cold, floor, 30_000, "empty call")
    line("single accesses without fault", SINGLE, clock(faults, 3), floor, 30_000, "empty call")
    line("mmap and munmap", SINGLE // 2 * 2, clock(pairs, 3), floor, 30_000, "empty call")
    line("mprotect that splits", SINGLE // 2, clock(splits), floor, 30_000, "empty call")


def many_areas() -> None:
    """65,000 vmas: the second half must not cost much more than the first."""
    p = Machine("linux-6.18", max_map_count=70_000).spawn()

    def half() -> None:
        for i in range(32_500):
            p.mmap(0, PAGE, R if i & 1 else RW, PRIV)

    first, second = clock(half), clock(half)
    print(f"{'65,000 vmas: second half against first':38} {second / first:15.2f} x")


def sparse() -> None:
    """A 1 TiB reservation with 1 GiB touched: memory that the model takes for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    p = Machine("linux-6.18").spawn()
    a = p.mmap(0, 1 << 40, RW, PRIV | 0x4000)
    p.access(a + (5 << 30), GIB, "w")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{'1 TiB sparse, 1 GiB touched':38} {grown:15.1f} MB  {'ok' if grown < 100 else 'BELOW TARGET'}")


if __name__ == "__main__":
    sparse()  # first: it looks at the high-water mark
    batched()
    object_interface()
    many_areas()
    sys.exit(0)
