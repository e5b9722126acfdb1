"""Stacks that were recorded raw (`--detail full`): unwound when the address spaces are known.

The recorder writes registers and the top of the stack; which file stands at an address is known from the
snapshots, of which the last is taken at exit. So `raw_stacks` becomes `stacks` when a recording ends, or when a
killed one is recovered. Where libdw is missing, a stack keeps its one certain frame, the instruction.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagelens.capture.tables import schema
from pagelens.linux import maps
from pagelens.linux.procfs import Process
from pagelens.linux.unwind import Unwinder
from pagelens.vm.errors import CapabilityMissingError, PagelensError
from pagelens.vm.vma import Vma, VmaList

if TYPE_CHECKING:
    from pagelens.capture.store import CaptureWriter

_STACK = 1024
_BATCH = 8192


def resolve(writer: CaptureWriter) -> tuple[int, int]:
    """Writes `stacks` for all of `raw_stacks` and removes that; returns (stacks, of which cut off)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = writer.path / "raw_stacks"
    parts = sorted(directory.glob("part-*.parquet")) if directory.is_dir() else []
    total = cut = 0
    spaces = _spaces(writer.path) if parts else {}
    for number, part in enumerate(parts):
        raw = pq.read_table(part)
        frames: list[Any] = []
        ids: list[int] = []
        complete: list[bool] = []
        for mm, pid in sorted({(r["mm"], r["pid"]) for r in raw.select(["mm", "pid"]).to_pylist()}):
            mask = pa.compute.and_(pa.compute.equal(raw["mm"], mm), pa.compute.equal(raw["pid"], pid))
            mine = raw.filter(mask)
            for at in range(0, mine.num_rows, _BATCH):
                chunk = mine.slice(at, _BATCH)
                found = _unwind(spaces.get(mm) or _live(pid), chunk)
                frames += found[0]
                complete += found[1]
                ids += chunk["stack_id"].to_pylist()
        rows = pa.table(
            [
                pa.array(ids, pa.int64()),
                pa.array(frames, pa.list_(pa.uint64())),
                pa.array(complete, pa.bool_()),
            ],
            schema=schema("stacks"),
        )
        # Numbers of the parts: far from those of segments, which hold stacks by frame pointers.
        writer.write("stacks", rows, part=1_000_000 + number)
        total += len(ids)
        cut += len(ids) - sum(complete)
    if parts:
        shutil.rmtree(directory)
    return total, cut


def _spaces(capture: Path) -> dict[int, VmaList]:
    # The file mappings of each address space; the latest snapshot knows what was loaded by then.
    import pyarrow.parquet as pq

    def rows(table: str, columns: list[str]) -> list[dict[str, Any]]:
        parts = sorted((capture / table).glob("part-*.parquet"))
        return [row for part in parts for row in pq.read_table(part, columns=columns).to_pylist()]

    latest = {
        r["mm"]: r["snapshot"]
        for r in sorted(rows("snapshots", ["mm", "snapshot"]), key=lambda r: r["snapshot"])
    }
    wanted = {snapshot: mm for mm, snapshot in latest.items()}
    vmas: dict[int, list[Vma]] = {}
    for row in rows("vmas", ["snapshot", "start", "end", "perms", "offset", "dev", "inode", "name"]):
        mm = wanted.get(row.pop("snapshot"))
        if mm is not None and (row["name"] or "").startswith("/"):
            prot, shared = Vma.parse_perms(row.pop("perms"))
            vmas.setdefault(mm, []).append(Vma(prot=prot, shared=shared, **row))
    return {mm: VmaList(found) for mm, found in vmas.items()}


def _live(pid: int) -> VmaList:
    # Without a snapshot of it: as the process is now, if it still is.
    try:
        with Process.open(pid) as proc:
            return maps.read(proc)
    except (PagelensError, OSError):
        return VmaList()


def _unwind(vmas: VmaList, chunk: Any) -> tuple[list[Any], list[bool]]:
    n = chunk.num_rows
    regs = np.array(chunk["regs"].to_pylist(), dtype=np.uint64).reshape(n, 17)
    stacks = np.zeros((n, _STACK), np.uint8)
    lengths = np.zeros(n, np.uint32)
    for i, data in enumerate(chunk["stack"].to_pylist()):
        stacks[i, : len(data)] = np.frombuffer(data, np.uint8)
        lengths[i] = len(data)
    try:
        with Unwinder(vmas) as unwinder:
            found = unwinder.unwind(regs, stacks, lengths)
    except CapabilityMissingError:
        return [[int(ip)] for ip in regs[:, 16]], [False] * n
    return [found.frames[i, : found.count[i]] for i in range(n)], found.complete.tolist()


def available() -> bool:
    """Whether raw stacks can be unwound here at all (libdw)."""
    try:
        Unwinder(VmaList()).close()
    except CapabilityMissingError:
        return False
    return True
