"""Tables of a checkpoint as Arrow, and back. Column names are the format (docs/checkpoint.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pagelens.checkpoint.image import BLOCK, ROW, OpenFile, ProcessState, Rows, ThreadState
from pagelens.linux.ptrace import REG_NAMES
from pagelens.vm.vma import Prot, Vma, VmaList


def runs(rows: Rows) -> Any:
    """image.ROW as a table."""
    import pyarrow as pa

    return pa.table({name: np.ascontiguousarray(rows[name]) for name in ROW.names or ()})


def to_rows(table: Any) -> Rows:
    """The inverse of `runs`."""
    out = np.zeros(table.num_rows, ROW)
    for name in ROW.names or ():
        out[name] = table[name].to_numpy()
    return out


def blocks(rows: Rows, hashes: Sequence[np.ndarray]) -> Any:
    """image.BLOCK with `page_hashes`, a list a block."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: np.ascontiguousarray(rows[name]) for name in BLOCK.names or ()}
    flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    offsets = np.concatenate(([0], np.cumsum([len(h) for h in hashes]))).astype(np.int32)
    columns["page_hashes"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
    return pa.table(columns)


def to_blocks(table: Any) -> tuple[Rows, np.ndarray, np.ndarray]:
    """(BLOCK rows, uint64 page hashes of all blocks, int64 index of each block's first hash)."""
    out = np.zeros(table.num_rows, BLOCK)
    for name in BLOCK.names or ():
        out[name] = table[name].to_numpy()
    column = table["page_hashes"].combine_chunks()
    flat = column.flatten().to_numpy() if table.num_rows else np.empty(0, np.uint64)
    count = out["pages"].astype(np.int64)
    return out, flat, np.cumsum(count) - count


def vmas(vma_list: VmaList) -> Any:
    """A vma a row; vm_flags is a space-separated string, null when not read."""
    import pyarrow as pa

    return pa.table(
        {
            "start": pa.array([v.start for v in vma_list], pa.uint64()),
            "end": pa.array([v.end for v in vma_list], pa.uint64()),
            "perms": pa.array([v.perms for v in vma_list], pa.string()),
            "offset": pa.array([v.offset for v in vma_list], pa.uint64()),
            "dev": pa.array([v.dev for v in vma_list], pa.string()),
            "inode": pa.array([v.inode for v in vma_list], pa.uint64()),
            "name": pa.array([v.name.encode(errors="surrogateescape") for v in vma_list], pa.binary()),
            "vm_flags": pa.array(
                [None if v.vm_flags is None else " ".join(sorted(v.vm_flags)) for v in vma_list], pa.string()
            ),
        }
    )


def to_vmas(table: Any) -> VmaList:
    """The inverse of `vmas`."""
    out = []
    for row in table.to_pylist():
        prot, shared = Vma.parse_perms(row["perms"])
        flags = row["vm_flags"]
        out.append(
            Vma(
                row["start"],
                row["end"],
                Prot(prot),
                shared,
                row["offset"],
                row["dev"],
                row["inode"],
                row["name"].decode(errors="surrogateescape"),
                None if flags is None else frozenset(flags.split()),
            )
        )
    return VmaList(out)


def threads(states: Sequence[ThreadState]) -> Any:
    """A thread a row: a column a register, binary columns for the rest."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "tid": pa.array([t.tid for t in states], pa.int32()),
        "comm": pa.array([t.comm for t in states], pa.string()),
    }
    for name in REG_NAMES:
        columns[name] = pa.array([t.regs[name] for t in states], pa.uint64())
    columns["sigmask"] = pa.array([t.sigmask for t in states], pa.uint64())
    columns["stop_signal"] = pa.array([t.stop_signal for t in states], pa.int32())
    columns["fpregs"] = pa.array([t.fpregs for t in states], pa.binary())
    columns["xstate"] = pa.array([t.xstate for t in states], pa.binary())
    columns["rseq"] = pa.array([t.rseq for t in states], pa.list_(pa.uint64()))
    columns["altstack"] = pa.array([t.altstack for t in states], pa.list_(pa.uint64()))
    columns["pending"] = pa.array([list(t.pending) for t in states], pa.list_(pa.binary()))
    return pa.table(columns)


def to_threads(table: Any) -> tuple[ThreadState, ...]:
    """The inverse of `threads`."""
    return tuple(
        ThreadState(
            tid=row["tid"],
            comm=row["comm"],
            regs={name: row[name] for name in REG_NAMES},
            fpregs=row["fpregs"],
            xstate=row["xstate"],
            sigmask=row["sigmask"],
            rseq=None if row["rseq"] is None else tuple(row["rseq"]),
            altstack=None if row["altstack"] is None else tuple(row["altstack"]),
            pending=tuple(row["pending"]),
            stop_signal=row["stop_signal"],
        )
        for row in table.to_pylist()
    )


def process(state: ProcessState) -> dict[str, Any]:
    """The manifest's `process` object."""
    return {
        "pid": state.pid,
        "starttime": state.starttime,
        "comm": state.comm,
        "exe": state.exe,
        "cmdline": list(state.cmdline),
        "cwd": state.cwd,
        "uid": state.uid,
        "gid": state.gid,
        "ppid": state.ppid,
        "auxv": state.auxv.hex(),
        "start_brk": f"{state.start_brk:#x}",
        "files": [
            {"fd": f.fd, "target": f.target, "pos": f.pos, "flags": f.flags, "dev": f.dev, "inode": f.inode}
            for f in state.files
        ],
        "children": list(state.children),
        "signals": {name: f"{mask:016x}" for name, mask in state.signals.items()},
        "time_ns": state.time_ns,
        "notes": list(state.notes),
        "mapped_files": state.backing,
    }


def to_process(
    entry: dict[str, Any], vma_list: VmaList, thread_list: tuple[ThreadState, ...]
) -> ProcessState:
    """The inverse of `process`."""
    return ProcessState(
        pid=entry["pid"],
        starttime=entry["starttime"],
        comm=entry["comm"],
        exe=entry["exe"],
        cmdline=tuple(entry["cmdline"]),
        cwd=entry["cwd"],
        uid=entry["uid"],
        gid=entry["gid"],
        ppid=entry["ppid"],
        auxv=bytes.fromhex(entry["auxv"]),
        start_brk=int(entry["start_brk"], 16),
        vmas=vma_list,
        threads=thread_list,
        files=tuple(OpenFile(**f) for f in entry["files"]),
        children=tuple(entry["children"]),
        signals={name: int(mask, 16) for name, mask in entry["signals"].items()},
        time_ns=entry["time_ns"],
        notes=tuple(entry["notes"]),
        backing=entry["mapped_files"],
    )
