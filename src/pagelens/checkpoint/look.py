"""Look into checkpoints: what differs between two, or between one and the process now.

Pages are compared by content hash; only pages that differ are read, to count bytes. A page that has no
contents in one of the two (unmapped, guard, special) is counted by itself. File pages by reference are
equal if both refer to the same page of the same file; one that only one side refers to is read from its file.
Each thread's rseq area, which the kernel writes, is left out.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint.image import Kind
from pagelens.checkpoint.memory import InMemory, capture
from pagelens.checkpoint.state import prepare
from pagelens.checkpoint.stored import Stored
from pagelens.linux import pagecopy
from pagelens.linux.hold import Held
from pagelens.linux.procfs import Process
from pagelens.vm.errors import DamagedInputError
from pagelens.vm.pages import distinct
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Vma

Side = Stored | InMemory


@dataclass(frozen=True, slots=True)
class RegionDiff:
    """Difference in one vma (as it is in either of the two). pages: that differ; nbytes: that differ in them;
    runs: [(address, pages)] of them; only_first, only_second: pages mapped in one of the two only."""

    start: int
    end: int
    name: str
    perms: str
    pages: int
    nbytes: int
    only_first: int
    only_second: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Diff:
    """regions with a difference; pages, nbytes in all; registers: tid -> names of registers that differ."""

    regions: tuple[RegionDiff, ...]
    registers: dict[int, tuple[str, ...]]
    threads_only_first: tuple[int, ...]
    threads_only_second: tuple[int, ...]
    pages: int = 0
    nbytes: int = 0
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def same(self) -> bool:
        """No difference in memory map, contents or threads."""
        return not (self.regions or self.registers or self.threads_only_first or self.threads_only_second)


def is_checkpoint(path: Path | str) -> bool:
    """Whether `path` looks like a checkpoint directory (for commands that take several sorts of input)."""
    return (Path(path) / "manifest.json").is_file() and (Path(path) / "pages.pack").is_file()


def open_side(what: str | int | Path) -> Side:
    """A checkpoint directory, or a process id: that is captured into memory now."""
    text = str(what)
    if text.isdigit() and not is_checkpoint(text):
        pid = int(text)
        prepare()
        with Process.open(pid) as proc, pagecopy.MemoryFile(pid) as mem, Held(pid) as held:
            return capture(proc, held, mem)
    return Stored.open(text)


def diff(first: Side, second: Side) -> Diff:
    """What differs. Errors as Stored.pages."""
    borders = sorted(
        {
            *first.vmas.starts.tolist(),
            *first.vmas.ends.tolist(),
            *second.vmas.starts.tolist(),
            *second.vmas.ends.tolist(),
        }
    )
    regions: list[RegionDiff] = []
    for start, end in pairwise(borders):
        a, b = first.vmas.find(start), second.vmas.find(start)
        if a is None and b is None:
            continue
        found = _region(first, second, a, b, start, end)
        if found is not None:
            regions.append(found)
    one = {t.tid: t for t in first.process.threads}
    two = {t.tid: t for t in second.process.threads}
    registers = {
        tid: tuple(name for name, value in one[tid].regs.items() if two[tid].regs[name] != value)
        + (("xstate",) if one[tid].xstate != two[tid].xstate else ())
        + (("altstack",) if _moved(one[tid].altstack, two[tid].altstack) else ())
        for tid in one.keys() & two.keys()
    }
    return Diff(
        tuple(regions),
        {tid: names for tid, names in sorted(registers.items()) if names},
        tuple(sorted(one.keys() - two.keys())),
        tuple(sorted(two.keys() - one.keys())),
        sum(r.pages for r in regions),
        sum(r.nbytes for r in regions),
    )


def _moved(one: object, two: object) -> bool:
    # Alternate signal stacks, where both are known.
    return None not in (one, two) and one != two


def _region(
    first: Side, second: Side, a: Vma | None, b: Vma | None, start: int, end: int
) -> RegionDiff | None:
    vma = b or a
    assert vma is not None
    pages = (end - start) // PAGE_SIZE
    if a is None or b is None:
        return RegionDiff(
            start, end, vma.name, vma.perms, 0, 0, 0 if a is None else pages, 0 if b is None else pages, ()
        )
    addr = _listed(first, second, start, end)
    kind_a, hash_a = _digest(first, addr, a)
    kind_b, hash_b = _digest(second, addr, b)
    unlike = (hash_a != hash_b) | (kind_a != kind_b)
    by_one = unlike & ((kind_a == Kind.FILE) != (kind_b == Kind.FILE))
    if by_one.any():
        unlike[by_one] = (_contents(first, addr[by_one], a) != _contents(second, addr[by_one], b)).any(axis=1)
    differs = _without_rseq(first, second, addr[unlike])
    changed_vma = (a.prot, a.shared, a.inode) != (b.prot, b.shared, b.inode)
    if not len(differs) and not changed_vma:
        return None
    nbytes = 0
    for at in range(0, len(differs), 4096):
        part = differs[at : at + 4096]
        nbytes += int((_contents(first, part, a) != _contents(second, part, b)).sum())
    perms = vma.perms if not changed_vma else f"{a.perms}>{b.perms}"
    return RegionDiff(start, end, vma.name, perms, len(differs), nbytes, 0, 0, _runs(differs))


def changed_words(first: Side, second: Side, region: RegionDiff, most: int = 4096) -> Any:
    """uint64[n]: address and number of bytes that differ, of each 8-byte word of a region that differs; of its first
    `most` pages. Shape (n, 2)."""
    a, b = first.vmas.find(region.start), second.vmas.find(region.start)
    if a is None or b is None:
        return np.empty((0, 2), np.uint64)
    parts = [
        np.arange(start, start + pages * PAGE_SIZE, PAGE_SIZE, dtype=np.uint64)
        for start, pages in region.runs
    ]
    addr = np.concatenate(parts)[:most] if parts else np.empty(0, np.uint64)
    differ = (_contents(first, addr, a) != _contents(second, addr, b)).reshape(-1, 8).sum(axis=1)
    words = np.flatnonzero(differ)
    where = addr[words // (PAGE_SIZE // 8)] + (words % (PAGE_SIZE // 8) * 8).astype(np.uint64)
    return np.stack([where, differ[words].astype(np.uint64)], axis=1)


def _contents(side: Side, addr: Any, vma: Vma) -> Any:
    # uint8[n, 4096]; pages of a private mapping that the side only refers to, from the file as far as it can be had.
    where = side.locate(addr)
    out = side.contents(where)
    if vma.inode and not vma.shared:
        kind = np.asarray(where.kind)
        for at in np.flatnonzero((kind == Kind.FILE) | (kind == 0)).tolist():
            page = _of_file(side, vma, int(addr[at]))
            out[at, : len(page)] = np.frombuffer(page, np.uint8)
    return out


def _of_file(side: Side, vma: Vma, addr: int) -> bytes:
    if isinstance(side, Stored):
        with contextlib.suppress(DamagedInputError):
            return side.file_page(vma.name, vma.offset + addr - vma.start)
        return b""
    with contextlib.suppress(OSError), open(f"/proc/{side.process.pid}/root{vma.name}", "rb") as file:
        return os.pread(file.fileno(), PAGE_SIZE, vma.offset + addr - vma.start)
    return b""


def _without_rseq(first: Side, second: Side, differs: Any) -> Any:
    # The kernel itself writes the CPU's number into each thread's rseq area whenever the thread moves.
    words = [t.rseq[:2] for t in first.process.threads if t.rseq is not None and t.rseq[0]]
    for pointer, size in words:
        page = np.uint64(pointer - pointer % PAGE_SIZE)
        if page in differs:
            at = np.array([page], np.uint64)
            one, two = first.contents(first.locate(at)), second.contents(second.locate(at))
            skip = pointer % PAGE_SIZE
            one[0, skip : skip + size] = two[0, skip : skip + size]
            if (one == two).all():
                differs = differs[differs != page]
    return differs


def _listed(first: Side, second: Side, start: int, end: int) -> Any:
    # Pages of [start, end) that either side has a row for; all others are absent in both.
    parts = []
    for side in (first, second):
        for row in side.rows[
            (side.rows["start"] < np.uint64(end))
            & (side.rows["start"] + side.rows["pages"] * np.uint64(PAGE_SIZE) > np.uint64(start))
        ]:
            low = max(int(row["start"]), start)
            high = min(int(row["start"]) + int(row["pages"]) * PAGE_SIZE, end)
            parts.append(np.arange(low, high, PAGE_SIZE, dtype=np.uint64))
    return distinct(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _digest(side: Side, addr: Any, vma: Vma) -> tuple[Any, Any]:
    # (class of contents, hash): absent anonymous pages and zero pages are both "zeros"; absent pages of a
    # private file mapping and clean ones are both "the file's".
    where = side.locate(addr)
    value = side.hashes(where)
    zero = int(pagecopy.hash_pages(np.zeros(PAGE_SIZE, np.uint8))[0][0])
    kind = np.asarray(where.kind).copy()
    of_file = bool(vma.inode) and not vma.shared
    absent = kind == 0
    kind[absent] = Kind.FILE if of_file else Kind.ZERO
    kind[(kind == Kind.DATA) & (value == np.uint64(zero))] = Kind.ZERO
    value[kind != Kind.DATA] = 0
    return kind, value


def _runs(addr: Any) -> tuple[tuple[int, int], ...]:
    if not len(addr):
        return ()
    first = np.flatnonzero(np.concatenate(([True], np.diff(addr) != np.uint64(PAGE_SIZE))))
    count = np.diff(np.concatenate((first, [len(addr)])))
    return tuple((int(addr[f]), int(c)) for f, c in zip(first.tolist(), count.tolist(), strict=True))
