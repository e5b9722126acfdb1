"""Accounting of a process: smaps, smaps_rollup, status and the fault counters.

All blocks of smaps have the same lines in the same order on one kernel (fs/proc/task_mmu.c, show_smap), so
the text is cut by that stride and each field becomes a column; 10,000 vmas parse in about 0.1 s. The stride
is checked against every line's key, so another layout is an error, never a wrong figure.

Rejected: a regular expression a line (ten times slower), psutil (it drops fields).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagelens.linux import maps
from pagelens.linux.procfs import Process, TaskStat
from pagelens.vm.accounting import SMAPS_FIELDS, Accounting
from pagelens.vm.errors import DamagedInputError, TargetGoneError
from pagelens.vm.vma import VmaList

_GATE = 1 << 63
_COUNTS = frozenset({"Threads", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"})


class Files(Protocol):
    """/proc/PID: `linux.procfs.Process`, or one of another machine (`proof.children.Files`)."""

    def read(self, name: str) -> bytes:
        """The whole of a file."""

    def stat(self) -> TaskStat:
        """The counters."""


def read(proc: Files) -> tuple[VmaList, Accounting]:
    """The vmas with their VmFlags, and all fields per vma in bytes, rows as the vmas; plus `status`."""
    vmas, fields, rows = parse(proc.read("smaps"))
    return vmas, Accounting.from_rows(fields, rows, status(proc))


def parse(data: bytes) -> tuple[VmaList, tuple[str, ...], npt.NDArray[np.int64]]:
    """(vmas, field names, int64[nvma, nfields] in bytes) of a smaps text."""
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        return VmaList(), (), np.empty((0, 0), np.int64)
    stride = next((i for i in range(1, len(lines)) if _is_header(lines[i])), len(lines))
    if len(lines) % stride:
        raise DamagedInputError(f"smaps is cut off: {len(lines)} lines are no multiple of {stride}")
    names: list[str] = []
    columns = []
    flags: list[frozenset[str]] | None = None
    for i in range(1, stride):
        key = lines[i].partition(b":")[0]
        column = lines[i::stride]
        width = len(key) + 1
        prefix = key + b":"
        if not all(line.startswith(prefix) for line in column):
            raise DamagedInputError(
                f"smaps has blocks of different fields (at {key.decode(errors='replace')})"
            )
        if key == b"VmFlags":
            known: dict[bytes, frozenset[str]] = {}
            flags = [known.get(line) or known.setdefault(line, _flags(line)) for line in column]
        elif column[0].endswith(b" kB"):
            try:
                columns.append([int(line[width:-3]) for line in column])
            except ValueError as exc:
                raise DamagedInputError(f"smaps: not a figure in {key.decode()}") from exc
            names.append(key.decode())
    headers = lines[::stride]
    vmas = [maps.parse_line(line, flags[i] if flags else None) for i, line in enumerate(headers)]
    rows = np.array(columns, dtype=np.int64).T * 1024 if columns else np.empty((len(vmas), 0), np.int64)
    if vmas[-1].start >= _GATE:  # [vsyscall], see maps.py
        vmas.pop()
        rows = rows[:-1]
    return VmaList(vmas), tuple(names), np.ascontiguousarray(rows)


def flagged(data: bytes, flag: bytes) -> list[tuple[int, int]]:
    """[(start, end)] of the vmas of a smaps text that have the VmFlag `flag` (two letters): for who needs no more,
    a tenth of what `parse` costs."""
    out = []
    header, *blocks = data.split(b"VmFlags: ")
    for block in blocks:
        flags, _, following = block.partition(b"\n")
        if flag in flags.split():
            start, _, rest = header.partition(b"-")
            out.append((int(start, 16), int(rest[: rest.index(b" ")], 16)))
        header = following
    return [pair for pair in out if pair[0] < maps.GATE]


def _is_header(line: bytes) -> bool:
    return b"-" in line.partition(b" ")[0]


def _flags(line: bytes) -> frozenset[str]:
    return frozenset(line.decode()[8:].split())


def rollup(proc: Files) -> dict[str, int]:
    """Totals from smaps_rollup, in bytes: one walk, far less text than smaps (but no Size, no VmFlags)."""
    total: dict[str, int] = {}
    for line in proc.read("smaps_rollup").splitlines()[1:]:
        key, _, value = line.partition(b":")
        if not value.endswith(b" kB"):
            raise DamagedInputError(f"smaps_rollup: cannot read {line[:80]!r}")
        total[key.decode()] = int(value[:-3]) * 1024
    return total


def totals(proc: Files) -> Accounting:
    """Totals only (smaps_rollup) with `status`."""
    total = rollup(proc)
    fields = tuple(name for name in SMAPS_FIELDS if name in total)
    return Accounting(fields, None, total, status(proc))


def status(proc: Files) -> dict[str, int]:
    """Memory fields of /proc/PID/status in bytes (VmRSS, RssAnon, VmPTE, …), thread count, fault counters."""
    out: dict[str, int] = {}
    for line in proc.read("status").splitlines():
        key, _, value = line.partition(b":")
        name = key.decode()
        if value.endswith(b" kB"):
            out[name] = int(value[:-3]) * 1024
        elif name in _COUNTS:
            out[name] = int(value)
    stat = proc.stat()
    out["min_flt"], out["maj_flt"] = stat.min_flt, stat.maj_flt
    return out


def thread_stats(proc: Process) -> dict[int, TaskStat]:
    """tid -> counters of every thread that is there now; a thread that goes meanwhile is left out."""
    out = {}
    for tid in proc.tasks():
        try:
            out[tid] = proc.stat(tid)
        except TargetGoneError:
            if not proc.alive:
                raise
    return out
