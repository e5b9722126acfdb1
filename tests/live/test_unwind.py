"""Stacks by .eh_frame: a chain of calls that the compiler made without frame pointers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagelens.linux import maps
from pagelens.linux.procfs import Process
from pagelens.linux.ptrace import Tracee
from pagelens.linux.unwind import REGISTERS, Unwinder
from pagelens.vm import VmaList


@pytest.fixture
def deep(subjects: Any) -> Iterator[tuple[int, Path]]:
    program = subjects("deep", "-O2", "-fomit-frame-pointer", "-no-pie")
    child = subprocess.Popen([program, "hold"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline()
    yield child.pid, program
    child.kill()
    child.communicate()


def sample(pid: int, size: int) -> tuple[VmaList, Any, Any]:
    tracee = Tracee.seize(pid)
    tracee.interrupt()
    assert tracee.wait(time.monotonic() + 5)
    regs = tracee.regs()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem:
        mem.seek(regs.rsp)
        stack = mem.read(size)
    with Process.open(pid) as proc:
        vmas = maps.read(proc)
    tracee.detach()
    row = np.array([[getattr(regs, name) for name in REGISTERS]], dtype=np.uint64)
    return vmas, row, np.frombuffer(stack, dtype=np.uint8).reshape(1, -1)


def sample_in_inner(pid: int, program: Path) -> tuple[VmaList, Any, Any]:
    """The program has printed, but may still be on its way out of printf."""
    for _ in range(100):
        vmas, regs, stack = sample(pid, 2048)
        if functions(program, [int(regs[0, 16])]) == ["inner"]:
            return vmas, regs, stack
        time.sleep(0.01)
    raise AssertionError("the subject never came to spin in inner()")


def functions(program: Path, addresses: list[int]) -> list[str]:
    out = subprocess.run(
        ["nm", "-S", "--defined-only", program], capture_output=True, text=True, check=True
    ).stdout
    table = [
        (int(f[0], 16), int(f[1], 16), f[3])
        for f in (line.split() for line in out.splitlines())
        if len(f) == 4
    ]
    # A return address may be the first byte behind its function: the call before it is what counts.
    calls = [a - (1 if i else 0) for i, a in enumerate(addresses)]
    return [next((n for s, z, n in table if s <= a < s + z), "?") for a in calls]


@pytest.mark.requires("ptrace", "libdw")
def test_the_whole_chain_is_found_without_frame_pointers(deep: tuple[int, Path]) -> None:
    pid, program = deep
    vmas, regs, stack = sample_in_inner(pid, program)
    with Unwinder(vmas) as unwinder:
        found = unwinder.unwind(regs, stack)
    names = functions(program, found.frames[0, : found.count[0]].tolist())
    assert names[:4] == ["inner", "middle", "outer", "main"]
    assert names[-1] == "_start"
    assert found.complete.tolist() == [True]


@pytest.mark.requires("ptrace", "libdw")
def test_a_short_copy_is_cut_off_and_says_so(deep: tuple[int, Path]) -> None:
    pid, program = deep
    vmas, regs, stack = sample_in_inner(pid, program)
    with Unwinder(vmas) as unwinder:
        # 160 bytes hold inner's frame (64 of locals) and its return address, not those of its callers.
        found = unwinder.unwind(
            np.repeat(regs, 2, axis=0), np.repeat(stack, 2, axis=0), np.array([160, 0], np.uint32)
        )
    assert functions(program, found.frames[0, : found.count[0]].tolist())[:2] == ["inner", "middle"]
    assert found.count[0] < 5
    assert found.count[1] == 1
    assert found.complete.tolist() == [False, False]
