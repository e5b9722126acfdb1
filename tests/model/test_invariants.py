"""What must hold whatever a program does, and that columns and single pages agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.support import BASE, PAGE, PROFILES
from pagelens.model import Machine, Process, batch

Step = tuple[str, int, int, int]
NAMES = (
    "mmap", "mmap", "populate", "shared", "file", "munmap", "mprotect", "read", "write", "write", "exec",
    "madvise", "mremap", "mlock", "munlock", "fork", "exit", "clear", "msync", "brk", "punch",
)  # fmt: skip
steps = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 47), st.integers(1, 24), st.integers(0, 40)), max_size=60
)
ADVICE = (4, 4, 8, 10, 11, 18, 19, 9, 12, 15, 20, 21, 22, 23, 102, 103)


class _World:
    def __init__(self, profile: str) -> None:
        self.machine = Machine(profile)
        first = self.machine.spawn()
        self.family = [first]
        self.file = first.memfd_create("f")
        self.file.ftruncate(20 * PAGE)
        self.disk = self.machine.file("/disk", 20 * PAGE)
        self.log: list[object] = []

    def do(self, step: Step) -> None:
        name, at, size, extra = step
        p = self.family[extra % len(self.family)]
        addr, length = BASE + at * PAGE, size * PAGE
        prot = (0, 1, 3, 3, 5)[extra % 5]
        calls: dict[str, Callable[[], object]] = {
            "mmap": lambda: p.mmap(addr, length, prot, 0x32),
            "populate": lambda: p.mmap(addr, length, 3, 0x8032),
            "shared": lambda: p.mmap(addr, length, prot, 0x31),
            "file": lambda: p.mmap(
                addr, length, prot, 0x11 + (extra & 1), (self.file, self.disk)[extra & 2 > 0], at % 8 * PAGE
            ),
            "munmap": lambda: p.munmap(addr, length),
            "mprotect": lambda: p.mprotect(addr, length, prot),
            "madvise": lambda: p.madvise(addr, length, ADVICE[extra % len(ADVICE)]),
            "mremap": lambda: p.mremap(
                addr,
                length,
                (1 + extra % 24) * PAGE,
                (0, 1, 3, 5)[extra % 4],
                BASE + (at * 7 + extra) % 60 * PAGE,
            ),
            "mlock": lambda: p.mlock2(addr, length, extra & 1),
            "munlock": lambda: p.munlock(addr, length),
            "clear": lambda: p.clear_refs(1 + extra % 5),
            "msync": lambda: p.msync(addr, length, 4),
            "brk": lambda: p.brk(p.mm.start_brk + size * 1000),
            "punch": lambda: self.file.fallocate(3, at * PAGE // 2, length),
            "fork": lambda: self.family.append(p.fork()) if len(self.family) < 4 else None,
            "exit": lambda: self._exit(p),
        }
        if name in ("read", "write", "exec"):
            got = p.access(addr, length, name[0] if name != "exec" else "x")
            self.log.append((got.minor, got.major, got.signal, got.si_code, got.addr))
        else:
            self.log.append(calls[name]())

    def _exit(self, p: Process) -> None:
        if len(self.family) > 1:
            self.family.remove(p)
            p.exit()


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=steps)
def test_counts_are_consistent_and_nothing_is_lost(profile: str, program: list[Step]) -> None:
    world = _World(profile)
    for step in program:
        world.do(step)
        world.machine.check()
        for p in world.family:
            snapshot = p.snapshot()
            assert snapshot.accounting is not None
            total, status = snapshot.accounting.total, snapshot.accounting.status
            assert total["Rss"] == status["VmRSS"]
            assert total["Size"] == status["VmSize"]
            parts = ("Shared_Clean", "Shared_Dirty", "Private_Clean", "Private_Dirty")
            assert sum(total[x] for x in parts) == total["Rss"]
            assert sum(v.size for v in snapshot.vmas if "lo" in (v.vm_flags or ())) == status["VmLck"] or (
                world.machine.profile.dontunmap_locks_twice
            )
    for p in list(world.family):
        p.exit()
    world.file.close()
    frames = world.machine.frames
    cached = len(world.disk.pages)
    # What remains are the pages of the file on disk.
    assert frames.used == cached
    assert len(frames.in_use()) == cached


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=steps)
def test_columns_agree_with_single_pages(program: list[Step]) -> None:
    def run(small: int) -> tuple[list[object], list[object]]:
        saved = batch.SMALL
        batch.SMALL = small
        try:
            world = _World("linux-6.12")
            for step in program:
                world.do(step)
        finally:
            batch.SMALL = saved
        log = [x for x in world.log if isinstance(x, int | tuple)]
        state: list[object] = []
        for p in world.family:
            state += [p.min_flt, p.maj_flt, p.mm.tables.bytes, p.mm.rss_anon, p.mm.rss_file]
            state.append((p.pagemap(BASE, 120) >> np.uint64(55)).tolist())
            state.append([(v.start, v.end, v.perms) for v in p.snapshot().vmas])
            accounting = p.snapshot().accounting
            assert accounting is not None
            state.append(accounting.total)
        rows = [(r["kind"], r["addr"], r["error_code"], r["gup"]) for r in world.machine.events.rows()]
        return log, [*state, *rows]

    assert run(1) == run(1 << 40)
