"""Faults of a capture, attributed: where (region), who (process, thread), from what (function, line, stack).

Columns in, columns out: each distinct place is named once, so a million faults cost a few numpy passes.
A fault's region is what was mapped at that address at that time (`capture.spaces`), its function is that of
the instruction; what has no name is counted, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.capture.areas import Area
from pagelens.capture.reader import Capture
from pagelens.capture.spaces import Spaces
from pagelens.linux import elf
from pagelens.linux.symbols import UNKNOWN, Code, PerfMap, Place, Symbolizer
from pagelens.vm.names import SYSCALLS
from pagelens.vm.regions import Kind
from pagelens.vm.vma import Prot

I64 = npt.NDArray[np.int64]
GROUPS = ("function", "line", "stack", "python", "vma", "region", "thread", "process", "kind")


@dataclass
class Faults:
    """The completed (or failed) faults of a capture in columns of equal length, order of time.

    mm, pid, tid, stack: int64, -1 null. addr, ip: uint64. error: int64, -1 unknown. major, user: bool.
    latency: int64 ns, -1 unknown. area, ip_area: index into `areas`, -1 unmapped.
    """

    capture: Capture
    spaces: Spaces
    columns: dict[str, Any]
    areas: list[Area]
    area: I64
    ip_area: I64
    symbolizer: Symbolizer = field(default_factory=Symbolizer)
    _jit: dict[int, PerfMap | None] = field(default_factory=dict)
    _elf: dict[tuple[str, int], str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.area)


def load(capture: Capture, *, failed: bool = False) -> Faults:
    """All completed faults, or with `failed` those that did not complete."""
    import pyarrow.compute as pc

    names = [
        "seq", "time_ns", "mm", "pid", "tid", "addr", "ip", "user_mode", "error_code", "major", "failed",
        "latency_ns", "in_syscall", "stack_id",
    ]  # fmt: skip
    table = capture.events([*names, "kind"])
    table = table.filter(pc.equal(table.column("kind"), "fault"))
    wanted = pc.fill_null(table.column("failed"), False)
    table = table.filter(wanted if failed else pc.invert(wanted))
    columns: dict[str, Any] = {}
    for name in names:
        column = table.column(name)
        if name in ("user_mode", "major", "failed"):
            columns[name] = pc.fill_null(column, name == "user_mode").to_numpy().astype(bool)
        elif name in ("addr", "ip"):
            columns[name] = pc.fill_null(column, 0).to_numpy().astype(np.uint64)
        else:
            columns[name] = pc.fill_null(column, -1).to_numpy().astype(np.int64)
    spaces = Spaces(capture)
    twice = np.concatenate((columns["mm"], columns["mm"]))
    times = np.concatenate((columns["time_ns"], columns["time_ns"]))
    found, areas = spaces.locate(twice, times, np.concatenate((columns["addr"], columns["ip"])))
    half = len(columns["mm"])
    return Faults(capture, spaces, columns, areas, found[:half], found[half:])


def code_at(faults: Faults, area: Area, address: int) -> Code | None:
    """The place of an address in a file mapping, for the symbolizer; None where no file stands behind it."""
    vma = area.vma
    if vma.name == "[vdso]":
        return Code("[vdso]", address - vma.start)
    if not vma.inode or not vma.name.startswith("/"):
        return None
    path = vma.name.removesuffix(" (deleted)")
    key = (path, vma.inode)
    if key not in faults._elf:
        headers = elf.read(path, vma.inode)
        faults._elf[key] = headers.build_id if headers else "-"
    build_id = faults._elf[key]
    return None if build_id == "-" else Code(path, address - vma.start + vma.offset, build_id)


def places(faults: Faults, pid: I64, area: I64, address: npt.NDArray[np.uint64]) -> tuple[I64, list[Place]]:
    """Name instructions: (index per row, places). Each distinct (process, area, address) is resolved once."""
    if not len(address):
        return np.empty(0, np.int64), []
    keys = np.stack((pid, area, address.view(np.int64)), axis=1)
    unique, back = np.unique(keys, axis=0, return_inverse=True)
    out: list[Place] = []
    todo: list[tuple[int, Code]] = []
    for i, (process, where, bits) in enumerate(unique.tolist()):
        out.append(UNKNOWN)
        if where < 0:
            continue
        item = faults.areas[where]
        value = bits & (1 << 64) - 1
        code = code_at(faults, item, value)
        if code is not None:
            todo.append((i, code))
        elif item.vma.prot & Prot.EXEC:
            if process not in faults._jit:
                faults._jit[process] = PerfMap.of(process, faults.capture.path)
            jit = faults._jit[process]
            if jit is not None:
                out[i] = jit.find(value)
    for (i, _), place in zip(todo, faults.symbolizer.resolve([c for _, c in todo]), strict=True):
        out[i] = place
    return back.reshape(-1).astype(np.int64), out


def module_of(faults: Faults, area: int) -> str:
    """Short name of the file (or region) that holds an area."""
    if area < 0:
        return "unmapped"
    vma = faults.areas[area].vma
    return Path(vma.name).name if vma.name.startswith("/") else (vma.name or "anonymous memory")


def region_of(faults: Faults, area: int) -> tuple[str, str]:
    """(kind, label) of an area."""
    if area < 0:
        return "unmapped", "unmapped, or being set up by execve"
    region = faults.spaces.labels.get(faults.areas[area])
    return (str(region.kind), region.label) if region else (str(Kind.ANON), "?")


def group(faults: Faults, by: str, *, depth: int = 8) -> list[dict[str, Any]]:
    """Rows of `pagelens faults --by …`, most faults first.

    Each: what, module, line (where they apply), faults, pages (distinct page of an mm), share, minor, major,
    user, kernel, time_ns (sum of latencies, None where it was not recorded).
    """
    key, names = _keys(faults, by, depth)
    total = len(faults)
    if not total:
        return []
    groups, back = np.unique(key, return_inverse=True)
    n = len(groups)
    c = faults.columns
    count = np.bincount(back, minlength=n)
    major = np.bincount(back, weights=c["major"], minlength=n).astype(int)
    user = np.bincount(back, weights=c["user_mode"], minlength=n).astype(int)
    timed = bool((c["latency_ns"] >= 0).any())
    time = np.bincount(back, weights=np.maximum(c["latency_ns"], 0).astype(float), minlength=n)
    page = c["addr"].view(np.int64) >> 12
    distinct = np.unique(np.stack((back.astype(np.int64), c["mm"], page), axis=1), axis=0)[:, 0]
    pages = np.bincount(distinct, minlength=n)
    rows = []
    for i in np.argsort(-count, kind="stable").tolist():
        rows.append(
            {
                **names(int(groups[i])),
                "faults": int(count[i]),
                "share": float(count[i] / total),
                "pages": int(pages[i]),
                "minor": int(count[i] - major[i]),
                "major": int(major[i]),
                "user": int(user[i]),
                "kernel": int(count[i] - user[i]),
                "time_ns": int(time[i]) if timed else None,
            }
        )
    return rows


def _keys(faults: Faults, by: str, depth: int) -> tuple[I64, Any]:
    # (a number per fault, function: number -> {"what": …, …})
    c = faults.columns
    if by in ("function", "line"):
        return _function_keys(faults, by)
    if by in ("stack", "python"):
        from pagelens.report import chains

        return chains.by_stack(faults, depth) if by == "stack" else chains.by_python(faults)
    if by == "vma":
        keys = faults.area * (1 << 20) + c["mm"]

        def name_vma(key: int) -> dict[str, Any]:
            mm, area = key & (1 << 20) - 1, key >> 20
            kind, label = region_of(faults, area)
            if area < 0:
                return {"what": label, "kind": kind, "mm": mm, "start": None, "end": None}
            vma = faults.areas[area].vma
            by = faults.areas[area].made_by
            return {"what": label, "kind": kind, "mm": mm, "start": vma.start, "end": vma.end, "made_by": by}

        return keys, name_vma
    if by == "region":
        labels = [region_of(faults, i) for i in range(len(faults.areas))] + [region_of(faults, -1)]
        names = sorted(set(labels))
        where = {label: i for i, label in enumerate(names)}
        table = np.array([where[label] for label in labels], dtype=np.int64)
        return table[faults.area], lambda k: {"what": names[k][1], "kind": names[k][0]}
    if by == "thread":
        comm = _comms(faults)
        return c["tid"], lambda k: {"what": f"{k} {comm.get(k, '')}".strip(), "tid": k}
    if by == "process":
        paths = {r["pid"]: r["path"] for r in faults.capture.table("mms").to_pylist() if r["path"]}
        return c["pid"], lambda k: {"what": f"{k} {paths.get(k, '')}".strip(), "pid": k}
    return _kind_keys(faults)


def _comms(faults: Faults) -> dict[int, str]:
    import pyarrow.compute as pc

    table = faults.capture.events(["kind", "name", "tid", "detail"])
    table = table.filter(pc.and_(pc.equal(table["kind"], "task"), pc.equal(table["name"], "comm")))
    return {r["tid"]: r["detail"] or "" for r in table.to_pylist()}


def _function_keys(faults: Faults, by: str) -> tuple[I64, Any]:
    c = faults.columns
    index, found = places(faults, c["pid"], faults.ip_area, c["ip"])
    first = np.zeros(len(found), dtype=np.int64)
    first[index] = faults.ip_area
    names: dict[tuple[str, str, str], int] = {}
    table = np.zeros(len(found), dtype=np.int64)
    for i, place in enumerate(found):
        line = f"{Path(place.file).name}:{place.line}" if place.line else ""
        name = (place.function, module_of(faults, int(first[i])), line if by == "line" else "")
        table[i] = names.setdefault(name, len(names))
    rows = list(names)

    def describe(key: int) -> dict[str, Any]:
        function, module, line = rows[key]
        out = {"what": function or f"? in {module}", "module": module}
        return {**out, "line": line or None} if by == "line" else out

    return table[index], describe


def _kind_keys(faults: Faults) -> tuple[I64, Any]:
    # What the error code says (arch/x86/include/asm/trap_pf.h), with the system call for kernel accesses.
    c = faults.columns
    code = np.where(c["error_code"] < 0, 1 << 10, c["error_code"])
    call = np.where(c["user_mode"], 0, c["in_syscall"] + 2)  # 1: the kernel, in no system call
    key = code * 4096 + np.where(c["major"], 2048, 0) + call

    def describe(k: int) -> dict[str, Any]:
        return {"what": describe_error(k >> 12, bool(k & 2048), (k & 2047) - 2)}

    return key, describe


def describe_error(code: int, major: bool = False, call: int = -2) -> str:
    """An x86 page-fault error code in words; code 1024 and above: not recorded.

    call: -2 an access of the program itself, -1 of the kernel, else of the kernel in that system call.
    """
    if code >= 1 << 10:
        text = "access (error code not recorded)"
    else:
        access = "exec" if code & 16 else "write" if code & 2 else "read"
        text = f"{access}, {'page present' if code & 1 else 'no page'}"
        if code & 32:
            text += ", protection key"
    if call == -1:
        text += ", by the kernel"
    elif call >= 0:
        text += f", by the kernel in {SYSCALLS.get(call, call)}"
    return text + (", major" if major else "")


def mappers(faults: Faults, seqs: list[int]) -> dict[int, str]:
    """Event number of a mapping call -> who called: the first frames, outside of the C library if there are
    any."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = faults.capture.events(["seq", "mm", "time_ns", "pid", "stack_id"])
    rows = table.filter(pc.is_in(table["seq"], pa.array(seqs, pa.int64()))).to_pylist()
    stacks = {r["stack_id"]: r["frames"] for r in faults.capture.table("stacks").to_pylist()}
    out = {}
    for row in rows:
        frames = [a - (1 if i else 0) for i, a in enumerate(stacks.get(row["stack_id"]) or []) if a]
        n = len(frames)
        area, areas = faults.spaces.locate(
            np.full(n, row["mm"], np.int64), np.full(n, row["time_ns"], np.int64), np.array(frames, np.uint64)
        )
        base = len(faults.areas)
        faults.areas = [*faults.areas, *areas]
        area = np.where(area >= 0, area + base, -1)
        index, found = places(faults, np.full(n, row["pid"], np.int64), area, np.array(frames, np.uint64))
        named = [
            (str(found[i]), module_of(faults, one))
            for i, one in zip(index.tolist(), area.tolist(), strict=True)
            if found[i].known
        ]
        # The C library's own frames only where the stack ends in them (it has no frame pointers).
        chain = [text for text, module in named if not module.startswith(("libc.", "ld-linux"))]
        chain = chain or [text for text, _ in named]
        out[row["seq"]] = " < ".join(chain[:2])
    return out


def stack_quality(faults: Faults) -> str:
    """How the call stacks were taken, and how many are known not to reach the outermost frame."""
    rows = {r["stack_id"]: r["complete"] for r in faults.capture.table("stacks").to_pylist()}
    ids, counts = np.unique(faults.columns["stack_id"], return_counts=True)
    by_frame = cut = without = 0
    for stack, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if stack not in rows:
            without += count
        elif rows[stack] is None:
            by_frame += count
        elif not rows[stack]:
            cut += count
    total = max(1, len(faults))
    if by_frame:
        return (
            f"stacks by frame pointers: {100 * by_frame / total:.1f} % of faults, often short (--detail full)"
        )
    return (
        f"stacks by .eh_frame: {100 * cut / total:.1f} % of faults cut off before the outermost frame,"
        f" {100 * without / total:.1f} % without a stack"
    )


def unnamed(faults: Faults) -> tuple[int, int]:
    """(faults whose instruction has no function name, faults in all)."""
    c = faults.columns
    index, found = places(faults, c["pid"], faults.ip_area, c["ip"])
    known = np.array([p.known for p in found], dtype=bool)
    return (int((~known[index]).sum()) if len(index) else 0), len(faults)
