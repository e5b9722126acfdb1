"""What a checkpoint is made of: rows of pages, blocks of contents, the state of process and threads.

Rows say where the contents of each page are, in columns. A page of a vma that has no row was absent: private
anonymous memory reads as zeros there, a private file mapping as its file. Each row points straight at the
checkpoint that holds its contents (`origin`), so reading through a chain of any length is one step, and a
chain's middle can be found missing at once. Rejected: rows that say "see parent" (a read walks the chain).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageRuns, PageState
from pagelens.vm.units import PAGE_SHIFT
from pagelens.vm.vma import VmaList

U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]

OWN = -1  # origin of contents in the checkpoint's own pack


class Kind(enum.IntEnum):
    """What a row says of its pages."""

    DATA = 1  # contents stored: block `block` of origin `origin`, from its page `first` on
    ZERO = 2  # all bytes zero (zero page, or a page full of zeros)
    FILE = 3  # clean page of a mapped file, by reference: the vma's path and offset
    GUARD = 4  # guard page (MADV_GUARD_INSTALL): an access is SIGSEGV
    SPECIAL = 5  # the kernel's own page ([vvar], device memory): not readable from outside
    UNREADABLE = 6  # present, yet neither process_vm_readv nor /proc/PID/mem gave it (hardware poison, …)


ROW = np.dtype(
    [
        ("start", np.uint64),
        ("pages", np.uint64),
        ("state", np.uint32),
        ("kind", np.uint8),
        ("origin", np.int16),
        ("block", np.int32),
        ("first", np.uint32),
    ]
)
BLOCK = np.dtype(
    [
        ("offset", np.uint64),
        ("stored", np.uint64),
        ("pages", np.uint32),
        ("codec", np.uint8),
        ("sum", np.uint64),
    ]
)
RAW, ZSTD = 0, 1
BLOCK_PAGES = 256


def per_page(rows: Rows) -> Rows:
    """ROW[n pages] with pages == 1 of run rows."""
    count = rows["pages"].astype(np.int64)
    total = int(count.sum())
    out = np.repeat(rows, count)
    begin = np.cumsum(count) - count
    within = np.arange(total, dtype=np.int64) - np.repeat(begin, count)
    out["start"] += within.astype(np.uint64) << np.uint64(PAGE_SHIFT)
    data = out["kind"] == Kind.DATA
    out["first"][data] += within[data].astype(np.uint32)
    out["pages"] = 1
    return out


def compress(rows: Rows) -> Rows:
    """Rows of equal meaning joined; ascending by address, without overlap."""
    if len(rows) < 2:
        return rows.copy()
    prev, this = rows[:-1], rows[1:]
    is_data = this["kind"] == Kind.DATA
    same = prev["start"] + (prev["pages"] << np.uint64(PAGE_SHIFT)) == this["start"]
    for name in ("state", "kind", "origin", "block"):
        same &= prev[name] == this[name]
    same &= ~is_data | (prev["first"].astype(np.uint64) + prev["pages"] == this["first"])
    first = np.flatnonzero(np.concatenate(([True], ~same)))
    out = rows[first].copy()
    out["pages"] = np.add.reduceat(rows["pages"], first)
    return out


def lookup(rows: Rows, addr: U64) -> npt.NDArray[np.int64]:
    """Index of the row that holds each address, -1 where none does."""
    if not len(rows):
        return np.full(len(addr), -1, np.int64)
    index = np.searchsorted(rows["start"], addr, side="right").astype(np.int64) - 1
    at = np.maximum(index, 0)
    end = rows["start"][at] + (rows["pages"][at] << np.uint64(PAGE_SHIFT))
    return np.where((index >= 0) & (addr < end), index, -1)


def page_runs(rows: Rows) -> PageRuns:
    """The rows' page states as the vocabulary's PageRuns; pages of zeros are marked ZERO."""
    state = rows["state"].astype(np.uint32).copy()
    state[rows["kind"] == Kind.ZERO] |= np.uint32(PageState.ZERO)
    return PageRuns(rows["start"].copy(), rows["pages"].copy(), state)


@dataclass(frozen=True, slots=True)
class ThreadState:
    """One thread at the instant of the checkpoint.

    regs: as linux.ptrace.UserRegs.as_dict. xstate: XSAVE area; fpregs: FXSAVE area. rseq: (address, length,
    signature, flags) or None if the kernel cannot tell. altstack: (sp, flags, size; 0: none) or None if
    it could not be read.
    pending: siginfo_t of signals that were queued for this thread. stop_signal: the job-control stop it was
    in, or the signal that was about to be delivered, or 0.
    """

    tid: int
    comm: str
    regs: dict[str, int]
    fpregs: bytes
    xstate: bytes
    sigmask: int
    rseq: tuple[int, int, int, int] | None = None
    altstack: tuple[int, int, int] | None = None
    pending: tuple[bytes, ...] = ()
    stop_signal: int = 0


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One descriptor: number, what it is (the link of /proc/PID/fd), offset and flags of fdinfo."""

    fd: int
    target: str
    pos: int
    flags: int
    dev: int
    inode: int


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What is known of the process besides its memory, at the instant of the checkpoint."""

    pid: int
    starttime: int
    comm: str
    exe: str
    cmdline: tuple[str, ...]
    cwd: str
    uid: int
    gid: int
    ppid: int
    auxv: bytes
    start_brk: int
    vmas: VmaList
    threads: tuple[ThreadState, ...]
    files: tuple[OpenFile, ...]
    children: tuple[int, ...]
    signals: dict[str, int]
    time_ns: int
    notes: tuple[str, ...] = ()
    backing: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> identity of a mapped file
