"""Save a process: hold all threads, take state and contents, let go, then hash, compress and write.

The target is stopped only while its state is read and its pages are copied into memory of ours; where they do
not fit into half of what is free, they are written while it is held, and the result says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.image import OWN, Kind, ProcessState, Rows, compress, per_page
from pagelens.checkpoint.listing import Listing
from pagelens.checkpoint.memory import InMemory
from pagelens.checkpoint.reuse import Reuse
from pagelens.checkpoint.state import identities, prepare, read_state
from pagelens.checkpoint.store import Writer
from pagelens.linux import pagecopy, pagemap, smaps
from pagelens.linux.hold import Held
from pagelens.linux.procfs import Process
from pagelens.vm.units import PAGE_SIZE, AddrRange

COMPARED = "all threads held, contents compared with the parent by hash"
_CHUNK_PAGES = 4096


@dataclass(frozen=True, slots=True)
class Result:
    """What a dump did. pages: with contents or known zero; stored_pages: in this checkpoint's own pack;
    stopped_ns: how long the target was held."""

    path: Path
    id: str
    pages: int
    captured_pages: int
    stored_pages: int
    reused_pages: int
    zero_pages: int
    file_pages: int
    stored_bytes: int
    stopped_ns: int
    total_ns: int
    method: str
    complete: bool
    notes: tuple[str, ...]


def dump(
    pid: int,
    out: Path,
    *,
    within: AddrRange | None = None,
    parent: Path | None = None,
    with_files: bool = False,
    dedup: tuple[Path, ...] | None = None,
    level: int = 1,
    force: bool = False,
    timeout: float = 5.0,
    files: Any = None,
) -> Result:
    """Checkpoint a process into directory `out`.

    within: only this range. parent: store only pages whose contents differ from it. dedup: also share pages
    of equal contents with these checkpoints, the parent's chain and within this one (() = only the latter
    two). Raises UsageError, TargetGoneError, CapabilityMissingError, DamagedInputError (parent); OSError
    (disk).
    """
    began = time.monotonic_ns()
    with Writer(out, level=level, force=force, files=files) as writer:
        reuse = Reuse(writer.final, parent, dedup)
        reuse.read_back = writer.read_back
        with Process.open(pid) as proc:
            held = Held(pid, timeout=timeout)
            listing = Listing(proc)
            listing.ahead()
            room = _prepared(proc, within)
            prepare()
            with held:
                state, plan, holes = _observe(proc, held, within, with_files, listing)
                if plan.pages * PAGE_SIZE <= memory_budget():
                    fits = plan.pages * PAGE_SIZE <= len(room)
                    data = room[: plan.pages * PAGE_SIZE] if fits else pagecopy.buffer(plan.pages)
                    with pagecopy.MemoryFile(pid) as mem:
                        bad = pagecopy.read(pid, mem, plan.capture_start, plan.capture_pages, data)
                    chunks: Iterator[tuple[pagecopy.U8, pagecopy.U8]] = slices(data, bad)
                    stored = None
                else:
                    plan.notes.append("more pages than fit into memory: written while the target was held")
                    with pagecopy.MemoryFile(pid) as mem:
                        stored = store_pages(writer, reuse, plan, _stream(pid, mem, plan))
            # Not while it is held: stat and build-ids of all mapped files take milliseconds.
            state = replace(state, backing=identities(proc, state.vmas))
            if stored is None:
                stored = store_pages(writer, reuse, plan, chunks)
        rows, counts = stored
        method = COMPARED if parent else "all threads held, full"
        unreadable = int(rows["pages"][rows["kind"] == Kind.UNREADABLE].sum())
        if unreadable:
            plan.notes.append(f"{unreadable} pages could not be read")
        meta = {
            "parent": reuse.parent_entry(),
            "origins": reuse.origins,
            "method": method,
            "complete": not unreadable,
            "notes": [*state.notes, *plan.notes],
            "range": None if within is None else [f"{within.start:#x}", f"{within.end:#x}"],
            "holes": [[f"{a:#x}", f"{b:#x}"] for a, b in holes],
            "stopped_ns": held.held_ns,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        path = writer.finish(state, rows, meta)
        return result(path, writer, rows, counts, meta, time.monotonic_ns() - began)


def save(image: InMemory, out: Path, *, level: int = 1, force: bool = False) -> Path:
    """Write a checkpoint that is held in memory."""
    with Writer(out, level=level, force=force) as writer:
        flat = per_page(image.rows)
        data = flat["kind"] == Kind.DATA
        flat["origin"] = OWN
        if data.any():
            hashes, _ = pagecopy.hash_pages(image.data)
            block, first = writer.append(image.data, hashes)
            taken = flat["first"][data].astype(np.int64)
            flat["block"][data], flat["first"][data] = block[taken], first[taken]
        for name in ("origin", "block", "first"):
            flat[name][~data] = 0
        meta = {
            "parent": None,
            "origins": [],
            "method": "all threads held, full, in memory first",
            "complete": True,
            "notes": [*image.process.notes, *image.manifest["notes"]],
            "range": None,
            "holes": [],
            "stopped_ns": 0,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return writer.finish(image.process, compress(flat), meta)


def result(
    path: Path, writer: Writer, rows: Rows, counts: dict[str, int], meta: dict[str, Any], took: int
) -> Result:
    """The Result of a finished dump."""

    def of(kind: Kind) -> int:
        return int(rows["pages"][rows["kind"] == kind].sum())

    return Result(
        path=path,
        id=writer.id,
        pages=of(Kind.DATA) + of(Kind.ZERO),
        captured_pages=counts["captured"],
        stored_pages=counts["stored"],
        reused_pages=int(rows["pages"][(rows["kind"] == Kind.DATA) & (rows["origin"] != OWN)].sum()),
        zero_pages=of(Kind.ZERO),
        file_pages=of(Kind.FILE),
        stored_bytes=writer.pack_bytes,
        stopped_ns=meta["stopped_ns"],
        total_ns=took,
        method=meta["method"],
        complete=meta["complete"],
        notes=tuple(meta["notes"]),
    )


def _observe(
    proc: Process, held: Held, within: AddrRange | None, with_files: bool, listing: Listing
) -> tuple[ProcessState, plans.Plan, list[tuple[int, int]]]:
    vmas, holes = plans.clip(listing.now(), within)
    span = None if within is None else (within.start, within.end)
    table = pagemap.read(proc, vmas, within=span)
    plan = plans.make(proc, vmas, table.runs, with_files=with_files)
    plan.notes.extend(table.notes)
    return read_state(proc, held, vmas, backing=False), plan, holes


def _prepared(proc: Process, within: AddrRange | None) -> pagecopy.U8:
    # Memory for what will be read, faulted in before the target is held: about its anonymous pages.
    status = smaps.status(proc)
    size = status.get("RssAnon", 0) + status.get("VmSwap", 0) + status.get("RssShmem", 0)
    if within is not None:
        size = min(size, within.end - within.start)
    size += size // 32 + (1 << 20)
    return pagecopy.buffer(size // PAGE_SIZE, ready=True) if size <= memory_budget() else pagecopy.buffer(0)


def memory_budget() -> int:
    """Bytes that may be held in memory: half of what is available."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    return 1 << 30


def slices(data: pagecopy.U8, bad: pagecopy.U8) -> Iterator[tuple[pagecopy.U8, pagecopy.U8]]:
    """Captured pages in chunks, with the mark of those that could not be read."""
    for at in range(0, len(bad), _CHUNK_PAGES):
        end = min(at + _CHUNK_PAGES, len(bad))
        yield data[at * PAGE_SIZE : end * PAGE_SIZE], bad[at:end]


def _stream(
    pid: int, mem: pagecopy.MemoryFile, plan: plans.Plan
) -> Iterator[tuple[pagecopy.U8, pagecopy.U8]]:
    buffer = pagecopy.buffer(_CHUNK_PAGES)
    starts, counts = plan.capture_start, plan.capture_pages
    ends = np.cumsum(counts)
    total, at = plan.pages, 0
    while at < total:
        end = min(at + _CHUNK_PAGES, total)
        lo, hi = np.searchsorted(ends, [at, end - 1], side="right")
        start, count = starts[lo : hi + 1].copy(), counts[lo : hi + 1].copy()
        count[-1] -= ends[hi] - np.uint64(end)
        skip = np.uint64(at) - (ends[lo] - counts[lo])
        start[0] += skip * np.uint64(PAGE_SIZE)
        count[0] -= skip
        part = buffer[: (end - at) * PAGE_SIZE]
        yield part, pagecopy.read(pid, mem, start, count, part)
        at = end


def store_pages(
    writer: Writer, reuse: Reuse, plan: plans.Plan, chunks: Iterator[tuple[pagecopy.U8, pagecopy.U8]]
) -> tuple[Rows, dict[str, int]]:
    """Hash, reuse or append each captured page; then the rows. counts: captured, stored."""
    total = plan.pages
    kind = np.full(total, Kind.DATA, np.uint8)
    origin = np.full(total, OWN, np.int16)
    block = np.full(total, -1, np.int32)
    first = np.zeros(total, np.uint32)
    addr = _capture_addresses(plan)
    at = stored = 0
    for data, bad in chunks:
        here = slice(at, at + len(bad))
        hashes, zero = pagecopy.hash_pages(data)
        kind[here][zero] = Kind.ZERO
        kind[here][bad != 0] = Kind.UNREADABLE
        wanted = kind[here] == Kind.DATA
        known = reuse.find(addr[here], hashes, data, wanted)
        origin[here], block[here], first[here] = known.origin, known.block, known.first
        fresh = np.flatnonzero(wanted & (known.block < 0))
        if len(fresh):
            kept = data if len(fresh) == len(bad) else data.reshape(-1, PAGE_SIZE)[fresh].reshape(-1)
            twin = reuse.twins(hashes[fresh], kept)
            once = np.flatnonzero(twin == np.arange(len(fresh)))
            if len(once) != len(fresh):
                kept = kept.reshape(-1, PAGE_SIZE)[once].reshape(-1)
            blocks, firsts = writer.append(kept, hashes[fresh[once]])
            place = np.searchsorted(once, twin)
            block[at + fresh], first[at + fresh] = blocks[place], firsts[place]
            stored += len(once)
            reuse.added(hashes[fresh[once]], blocks, firsts)
        at += len(bad)
    flat = per_page(plan.rows)
    data_rows = flat["kind"] == Kind.DATA
    taken = flat["first"][data_rows].astype(np.int64)
    for name, column in (("kind", kind), ("origin", origin), ("block", block), ("first", first)):
        flat[name][data_rows] = column[taken]
    for name in ("origin", "block", "first"):
        flat[name][flat["kind"] != Kind.DATA] = 0
    return compress(flat), {"captured": total, "stored": stored}


def _capture_addresses(plan: plans.Plan) -> pagecopy.U64:
    count = plan.capture_pages.astype(np.int64)
    begin = np.cumsum(count) - count
    within = np.arange(int(count.sum()), dtype=np.int64) - np.repeat(begin, count)
    addr: pagecopy.U64 = np.repeat(plan.capture_start, count) + within.astype(np.uint64) * np.uint64(
        PAGE_SIZE
    )
    return addr
