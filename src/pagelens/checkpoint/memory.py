"""A checkpoint in memory: the same questions as `Stored` answers, without a disk. What `Checkpoint` rolls
back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.image import OWN, Kind, ProcessState, Rows, compress, lookup, per_page
from pagelens.checkpoint.state import read_state
from pagelens.checkpoint.stored import Located
from pagelens.linux import pagecopy, pagemap, smaps
from pagelens.linux.hold import Held
from pagelens.linux.procfs import Process
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import Prot, Vma, VmaList


class InMemory:
    """rows: image.ROW, those of kind DATA with `first` = page number in `data` (uint8[pages * 4096])."""

    def __init__(
        self, process: ProcessState, rows: Rows, data: pagecopy.U8, notes: tuple[str, ...] = ()
    ) -> None:
        self.process, self.rows, self.data = process, rows, data
        self.path = Path(f"(memory, process {process.pid})")
        self.manifest: dict[str, Any] = {"range": None, "origins": [], "notes": list(notes)}
        self._hashes: pagecopy.U64 | None = None

    @property
    def vmas(self) -> VmaList:
        """The vma list."""
        return self.process.vmas

    def locate(self, addr: pagecopy.U64) -> Located:
        """As Stored.locate; block is always 0."""
        index = lookup(self.rows, addr)
        row = self.rows[np.maximum(index, 0)]
        within = ((addr - row["start"]) >> np.uint64(PAGE_SHIFT)).astype(np.uint32)
        first = row["first"] + np.where(row["kind"] == Kind.DATA, within, np.uint32(0))
        return Located(
            np.where(index < 0, 0, row["kind"]), np.full(len(addr), OWN), np.zeros(len(addr), np.int32), first
        )

    def hashes(self, where: Located) -> pagecopy.U64:
        """As Stored.hashes; all pages are hashed at the first call."""
        if self._hashes is None:
            self._hashes = pagecopy.hash_pages(self.data)[0]
        out = np.zeros(len(where.kind), np.uint64)
        data = where.kind == Kind.DATA
        out[data] = self._hashes[where.first[data]]
        return out

    def contents(self, where: Located) -> Any:
        """As Stored.contents."""
        out = np.zeros((len(where.kind), PAGE_SIZE), np.uint8)
        data = where.kind == Kind.DATA
        out[data] = self.data.reshape(-1, PAGE_SIZE)[where.first[data]]
        return out


def capture(proc: Process, held: Held, mem: pagecopy.MemoryFile, *, to_write: bool = False) -> InMemory:
    """A held process, all of it, into memory. to_write: also the contents of clean pages of writable private
    mappings of files, for a rollback. Errors as `dump`."""
    vmas, _ = smaps.read(proc)
    state = read_state(proc, held, vmas, backing=False)
    plan = plans.make(proc, vmas, pagemap.read(proc, vmas).runs)
    flat = _with_private_file_pages(plan, list(vmas)) if to_write else per_page(plan.rows)
    data_rows = flat["kind"] == Kind.DATA
    addr = flat["start"][data_rows]
    flat["first"][data_rows] = np.arange(len(addr), dtype=np.uint32)
    flat["block"][data_rows] = 0
    data = pagecopy.buffer(len(addr))
    bad = pagecopy.read(proc.pid, mem, addr, np.ones(len(addr), np.uint64), data)
    if bad.any():
        flat["kind"][np.flatnonzero(data_rows)[bad != 0]] = Kind.FILE  # beyond the end of its file
    return InMemory(state, compress(flat), data, tuple(plan.notes))


def _with_private_file_pages(plan: plans.Plan, vmas: list[Vma]) -> Any:
    # Writable private file mappings: every page's contents are saved, because a page that is still the file's
    # may have a private copy at the rollback, and writing it is cheaper than making the target drop it.
    flat = per_page(plan.rows)
    extra = []
    for vma in vmas:
        if vma.inode and not vma.shared and vma.prot & Prot.WRITE:
            addr = np.arange(vma.start, vma.end, PAGE_SIZE, dtype=np.uint64)
            lo, hi = np.searchsorted(flat["start"], [np.uint64(vma.start), np.uint64(vma.end)])
            here = flat[lo:hi]
            here["kind"][here["kind"] == Kind.FILE] = Kind.DATA
            missing = np.ones(len(addr), bool)
            missing[((here["start"] - np.uint64(vma.start)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)] = (
                False
            )
            rest = addr[missing]
            rows = np.zeros(len(rest), flat.dtype)
            rows["start"], rows["pages"], rows["kind"] = rest, 1, Kind.DATA
            extra.append(rows)
    if extra:
        flat = np.concatenate((flat, *extra))
        flat = flat[np.argsort(flat["start"], kind="stable")]
    return flat
