"""The parts of the C core that read, copy, hash, unwind and watch memory: on this process, and on wrong input."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

import pagelens
from pagelens.linux import maps, memory, pagecopy, residency, unwind
from pagelens.linux.native import lib_dir, library
from pagelens.linux.procfs import Process

PAGE = 4096


def test_the_sanitizers_are_there() -> None:
    """Where the build with sanitizers is named, that build is what is tested."""
    sanitized = b"__asan_init" in (lib_dir() / "libpagelens.so").read_bytes()
    assert sanitized is ("asan" in os.environ.get("PAGELENS_LIB_DIR", ""))


def test_hashes_of_every_length() -> None:
    """No length reads beyond its end; one changed byte changes the sum."""
    data = np.random.default_rng(1).integers(0, 255, 5 * PAGE, np.uint8)
    for n in (*range(200), PAGE - 1, PAGE, PAGE + 1):
        block = np.array(data[:n])
        before = pagecopy.hash_bytes(block)
        if n:
            block[n - 1] ^= 1
            assert pagecopy.hash_bytes(block) != before
    pages = np.zeros(3 * PAGE, np.uint8)
    pages[2 * PAGE - 1] = 1
    assert pagecopy.hash_pages(pages)[1].tolist() == [True, False, True]


@pytest.mark.parametrize("runs", [1, 3, 600, 1300])
def test_copies_of_many_runs_with_holes(runs: int) -> None:
    """More runs than one call takes; pages without rights are read through /proc/PID/mem, holes are marked."""
    libc = ctypes.CDLL(None)
    area = mmap.mmap(-1, 2 * runs * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(area, np.uint8)
    view[:] = np.arange(2 * runs, dtype=np.uint64).astype(np.uint8).repeat(PAGE)
    start = view.ctypes.data
    addr = (start + np.arange(runs, dtype=np.uint64) * np.uint64(2 * PAGE)).astype(np.uint64)
    pages = np.ones(runs, np.uint64)
    out = np.empty(runs * PAGE, np.uint8)
    hidden, hole = runs // 2, runs - 1
    with pagecopy.MemoryFile(os.getpid(), write=True) as mem:
        libc.mprotect(ctypes.c_void_p(int(addr[hidden])), ctypes.c_size_t(PAGE), 0)
        bad = pagecopy.read(os.getpid(), mem, addr, pages, out)
        assert bad.tolist() == [0] * runs
        assert out.reshape(runs, PAGE)[:, 7].tolist() == [2 * i & 255 for i in range(runs)]
        libc.mprotect(ctypes.c_void_p(int(addr[hidden])), ctypes.c_size_t(PAGE), 3)
        addr[hole] = np.uint64(PAGE)  # below mmap_min_addr: never mapped
        bad = pagecopy.read(os.getpid(), mem, addr, pages, out)
        assert np.flatnonzero(bad).tolist() == [hole] and not out[hole * PAGE :].any()
        bad = pagecopy.write(os.getpid(), mem, addr, pages, out)
        assert np.flatnonzero(bad).tolist() == [hole]


def test_page_sums_and_residency(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * PAGE + 100))
    with path.open("rb") as file:
        assert len(residency._mincore(file.fileno(), 1, 100)) == 5
        assert residency._mincore(file.fileno(), 0, 6).tolist() == [True] * 6
    area = mmap.mmap(-1, 8 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = np.frombuffer(area, np.uint8).ctypes.data
    hashes, readable = memory.hash_pages(os.getpid(), [(start, start + 8 * PAGE), (PAGE, 3 * PAGE)])
    assert readable.tolist() == [True] * 8 + [False] * 2 and len(set(hashes[:8].tolist())) == 1


def test_bulk_reads_of_entries(tmp_path: Path) -> None:
    """As of pagemap: several runs, one beyond the end of the file; what is not there stays."""
    path = tmp_path / "entries"
    path.write_bytes(np.arange(100, dtype="<u8").tobytes())
    first, count = np.array([3, 90, 500], np.uint64), np.array([2, 20, 4], np.uint64)
    out = np.full(26, 7, np.uint64)
    call = library().pl_pread_u64
    call.argtypes = [ctypes.c_int, ctypes.c_size_t] + [ctypes.c_void_p] * 3
    with path.open("rb") as file:
        assert call(file.fileno(), 3, first.ctypes.data, count.ctypes.data, out.ctypes.data) == 0
        assert out.tolist() == [3, 4, *range(90, 100), *([7] * 14)]
    assert call(-1, 1, first.ctypes.data, count.ctypes.data, out.ctypes.data) == -9
    assert library().pl_probe_soft_dirty() in (0, 1, 2, 3)


@pytest.mark.requires("libdw")
def test_unwinding_of_nonsense() -> None:
    """Random registers and stacks, instructions within our own libraries, copies of every length."""
    with Process.open(os.getpid()) as proc:
        vmas = maps.read(proc)
    code = [v for v in vmas if v.name.startswith("/") and v.perms == "r-xp"]
    chance = np.random.default_rng(3)
    n = 200
    regs = chance.integers(0, 1 << 63, (n, 17)).astype(np.uint64)
    regs[:, 16] = [
        code[i % len(code)].start + int(chance.integers(0, code[i % len(code)].size)) for i in range(n)
    ]
    stacks = chance.integers(0, 255, (n, 1024), np.uint8)
    stacks.view(np.uint64)[:, ::3] = regs[:1, 16]
    lengths = np.arange(n, dtype=np.uint32) * 6
    with unwind.Unwinder(vmas) as unwinder:
        found = unwinder.unwind(regs, stacks, lengths)
    assert (found.count >= 1).all() and (found.count <= unwind.MAX_FRAMES).all()
    assert (found.frames[:, 0] == regs[:, 16]).all()
    with unwind.Unwinder([]) as unwinder:
        assert unwinder.unwind(regs[:2], stacks[:2]).count.tolist() == [1, 1]


@pytest.mark.parametrize(
    "backend",
    ["mprotect", pytest.param("uffd-sync", marks=pytest.mark.requires("uffd-wp"))],
)
def test_watched_writes(backend: str) -> None:
    """The write barrier (SIGSEGV) and the handler thread (userfaultfd): the pages that were written, no more."""
    area = mmap.mmap(-1, 70 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(area, np.uint8)
    view[:] = 1
    with contextlib.closing(pagelens.track(view, backend=backend)) as tracker:
        assert not len(tracker.epoch().start)
        for pages in ([0, 69], list(range(64)), [63, 64], []):
            for page in pages:
                view[page * PAGE + 5] += 1
            epoch = tracker.epoch()
            assert [(int(a) - view.ctypes.data) // PAGE for a in epoch.addresses()] == pages
