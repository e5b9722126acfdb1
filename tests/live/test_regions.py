"""Regions of a child that lays out its memory as told: each is named, by address."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.vm.regions import Kind, Region
from support.puppet import (
    MAP_ANON,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    RW,
    Puppet,
)
from support.subjects import Subjects

MB = 1 << 20


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as child:
        yield child


def named(pid: int) -> list[Region]:
    with Process.open(pid) as proc:
        vmas = snapshot.take(proc, pages=False).vmas
        found, notes = regions.regions(proc, vmas)
    assert notes == ()
    # Regions cover the vmas exactly.
    assert sum(r.end - r.start for r in found) == sum(v.size for v in vmas)
    assert all(vmas[r.vma].start <= r.start < r.end <= vmas[r.vma].end for r in found)
    return found


def at(found: list[Region], addr: int) -> Region:
    return next(r for r in found if r.start <= addr < r.end)


def test_malloc(puppet: Puppet) -> None:
    small, _ = puppet.tell("malloc", 1000)
    big, _ = puppet.tell("malloc", 64 * MB)
    found = named(puppet.pid)
    assert at(found, small).kind is Kind.HEAP
    chunk = at(found, big)
    assert chunk.kind is Kind.CHUNK
    assert (chunk.start, chunk.end) == (big - 16, big - 16 + 64 * MB + PAGE)


def test_two_chunks_in_one_vma(puppet: Puppet) -> None:
    sizes = [40 * MB + PAGE, 30 * MB + 3 * PAGE]
    upper, _ = puppet.tell("malloc", sizes[0] - 16)
    lower, _ = puppet.tell("malloc", sizes[1] - 16)
    if lower - 16 + sizes[1] != upper - 16:
        # A kernel that aligns big mappings leaves a gap; put them side by side by hand.
        base = puppet.island(20)
        for page, length in ((0, 8), (8, 12)):
            puppet.write(base + page * PAGE)
            for i, byte in enumerate(((length * PAGE) | 2).to_bytes(8, "little")):
                puppet.tell("write", base + page * PAGE + 8 + i, 1, 1, byte)
            puppet.tell("write", base + page * PAGE, 1, 1, 0)
        lower, upper, sizes = base + 16, base + 8 * PAGE + 16, [12 * PAGE, 8 * PAGE]
    found = named(puppet.pid)
    one, two = at(found, lower), at(found, upper)
    assert one.vma == two.vma
    assert one.kind is two.kind is Kind.CHUNK
    assert (one.start, one.end, two.start, two.end) == (
        lower - 16,
        upper - 16,
        upper - 16,
        upper - 16 + sizes[0],
    )


def test_thread_stack_guard_and_arena(puppet: Puppet) -> None:
    tid, local = puppet.tell("thread")
    found = named(puppet.pid)
    stack = at(found, local)
    assert stack.kind is Kind.THREAD_STACK
    assert stack.label == f"stack of thread {tid} (sleeper)"
    assert stack.end - stack.start == 8 * MB
    guard = at(found, stack.start - 1)
    assert guard.kind is Kind.GUARD
    assert guard.end - guard.start == PAGE
    assert f"thread {tid}" in guard.label


def test_a_stack_that_shares_its_vma(puppet: Puppet) -> None:
    """What Linux 6.1 does by itself: the stack's vma merges with memory right above it (same flags)."""
    room = 8 * MB + PAGE  # a stack with its guard: leave exactly that below four pages
    base = puppet.mmap(room // PAGE + 4)
    puppet.sys("munmap", base, room)
    above = base + room
    _, local = puppet.tell("thread")
    assert at(named(puppet.pid), local).end == above
    puppet.mmap(4, RW, MAP_PRIVATE | MAP_ANON | 0x20000, at=above)  # MAP_STACK: the same flags as the stack
    puppet.write(above, 4)
    found = named(puppet.pid)
    assert at(found, local).vma == at(found, above).vma
    assert at(found, local).end == above == at(found, above).start
    assert at(found, local).kind is Kind.THREAD_STACK
    # On 6.1 it may merge with the TLS above it as well; what lies below that cannot be told apart.
    assert at(found, above).kind in (Kind.ANON, Kind.TLS)


def test_a_stack_below_a_big_chunk(puppet: Puppet) -> None:
    """Case 1: 100 MB of malloc, then a thread. On 6.1 both lie in one vma (asserted by its flags); named
    anyhow."""
    big, _ = puppet.tell("malloc", 100 * MB)
    puppet.write(big, 100)
    tid, local = puppet.tell("thread")
    found = named(puppet.pid)
    chunk, stack = at(found, big), at(found, local)
    assert (chunk.kind, stack.kind) == (Kind.CHUNK, Kind.THREAD_STACK)
    assert (chunk.start, chunk.end) == (big - 16, big - 16 + 100 * MB + PAGE)
    assert (stack.end - stack.start, stack.label) == (8 * MB, f"stack of thread {tid} (sleeper)")
    with Process.open(puppet.pid) as proc:
        vmas = snapshot.take(proc).vmas
    flags = vmas[stack.vma].vm_flags or frozenset()
    if stack.end == chunk.start:
        # Side by side. One vma exactly where MAP_STACK leaves the stack the same flags (before 6.7).
        assert (stack.vma == chunk.vma) is ("nh" not in flags)


def test_library_and_program(puppet: Puppet) -> None:
    found = named(puppet.pid)
    libc = [r.kind for r in found if r.label.startswith("libc.so.6 ")]
    assert libc == [Kind.RODATA, Kind.TEXT, Kind.RODATA, Kind.RELRO, Kind.DATA, Kind.BSS]
    assert at(found, puppet.line).kind in (Kind.BSS, Kind.DATA)
    assert {Kind.STACK, Kind.VDSO, Kind.VVAR, Kind.TLS} <= {r.kind for r in found}


def test_shared_kinds(puppet: Puppet) -> None:
    anon = puppet.mmap(4, RW, MAP_SHARED | MAP_ANON)
    puppet.tell("write", puppet.line + 1000, 1, 1, ord("x"))
    puppet.tell("write", puppet.line + 1001, 1, 1, 0)
    fd = puppet.sys("memfd_create", puppet.line + 1000, 0)
    puppet.sys("ftruncate", fd, 4 * PAGE)
    memfd = puppet.mmap(4, RW, MAP_SHARED, fd=fd)
    segment = puppet.sys("shmget", 0, 8 * PAGE, 0o1600)
    sysv = puppet.sys("shmat", segment, 0, 0)
    puppet.sys("shmctl", segment, 0, 0)
    jit = puppet.island(2, PROT_READ | PROT_EXEC)
    reserved = puppet.island(4096, PROT_NONE)
    found = named(puppet.pid)
    assert at(found, anon).kind is Kind.SHARED_ANON
    assert (at(found, memfd).kind, at(found, memfd).label) == (Kind.MEMFD, "memfd x")
    assert at(found, sysv).kind is Kind.SYSV
    assert str(segment) in at(found, sysv).label
    assert at(found, jit).kind is Kind.JIT
    assert at(found, reserved).kind is Kind.RESERVED


def test_evidence_faults_nothing_in(puppet: Puppet) -> None:
    """Looking leaves the target's fault counters and pages alone."""
    puppet.tell("thread")
    puppet.tell("malloc", 32 * MB)
    before = snapshot.take(puppet.pid)
    named(puppet.pid)
    after = snapshot.take(puppet.pid)
    assert before.accounting is not None
    assert after.accounting is not None
    assert after.accounting.status["min_flt"] == before.accounting.status["min_flt"]
    assert after.accounting.total["Rss"] == before.accounting.total["Rss"]


def test_a_python_program_has_no_notes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
                             stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert child.stdout is not None
        child.stdout.readline()
        kinds = {r.kind for r in named(child.pid)}
    finally:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
    assert {Kind.TEXT, Kind.HEAP, Kind.STACK} <= kinds
