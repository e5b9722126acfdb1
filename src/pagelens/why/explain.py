"""Explain: one fault's verdict with the rows that it rests on.

Bulk classification keeps no rows (a million faults would make ten million); they are found again for the few
faults that somebody asks about.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pagelens.why.classified import Classified
from pagelens.why.evidence import Area, Forked, Origin, unpack
from pagelens.why.facts import Call, Task
from pagelens.why.verdict import Verdict

_PROT = ("---", "r--", "-w-", "rw-", "--x", "r-x", "-wx", "rwx")
_AREA = {
    Area.ANON: "private anonymous memory",
    Area.FILE: "private file mapping",
    Area.SHARED_FILE: "shared file mapping",
    Area.SHMEM: "shared memory",
    Area.HUGETLB: "hugetlb mapping",
    Area.SPECIAL: "special mapping",
    Area.UNSEEN: "mapped before the recording",
    Area.UNMAPPED: "not mapped",
}


class Explainer:
    """Finds the evidence rows of single faults."""

    def __init__(self, result: Classified) -> None:
        self.result = result
        self._calls = {c.seq: c for c in result.facts.calls}
        self._tasks = {t.seq: t for t in result.facts.tasks}

    def verdict(self, row: int) -> Verdict:
        """The verdict on row `row` of `run.faults`, with its evidence rows."""
        return replace(self.result.of(row), evidence=tuple(self.rows(row)))

    def rows(self, row: int) -> list[dict[str, Any]]:
        """The fault itself, then what its verdict rests on, oldest last."""
        result = self.result
        out = [self.fault(row)]
        before = int(result.past.before[row])
        if before >= 0:
            out.append(self.fault(before) | {"role": "fault before it on the page"})
        life = int(result.past.life[row])
        if life >= 0:
            out += self._birth(life)
        state = int(result.run.state[row])
        if state >= 0:
            made = result.run.lives.states[state].made
            if made >= 0 and all(r.get("seq") != made for r in out):
                out += self._event(made, "mapped it")
        if row in result.run.removed:
            out += self._event(result.run.removed[row], "unmapped what was there")
        out += self._fork(row)
        return out

    def fault(self, row: int) -> dict[str, Any]:
        """A fault as an evidence row."""
        faults, result = self.result.run.faults, self.result
        e = unpack(int(result.evidence[row]))
        state = int(result.run.state[row])
        where = "not mapped"
        if state >= 0:
            held = result.run.lives.states[state]
            where = f"{_AREA[held.area]} {_PROT[held.prot & 7]}" + (f" {held.name}" if held.name else "")
        error = int(faults.error[row])
        latency = int(faults.latency[row])
        return {
            "seq": int(faults.seq[row]),
            "kind": "fault",
            "role": "the fault",
            "what": f"{'write' if e.write else 'fetch' if e.exec else 'read'} at {int(faults.addr[row]):#x}"
            if e.known
            else f"access at {int(faults.addr[row]):#x}",
            "time_ns": int(faults.time[row]),
            "mm": int(faults.mm[row]),
            "tid": int(faults.tid[row]),
            "ip": f"{int(faults.ip[row]):#x}",
            "error_code": error if error >= 0 else None,
            "major": bool(faults.major[row]),
            "latency_ns": latency if latency >= 0 else None,
            "where": where,
            "cause": result.of(row).cause,
        }

    def _birth(self, life: int) -> list[dict[str, Any]]:
        lives = self.result.run.lives
        origin = Origin(lives.origin[life])
        if origin is Origin.SNAPSHOT:
            return [
                {"seq": None, "kind": "snapshot", "role": "mapped it", "what": "there at the first snapshot"}
            ]
        role = {
            Origin.DONTNEED: "dropped the page",
            Origin.CUT: "took the page out of its file",
            Origin.FORK: "copied the address space",
            Origin.GROWTH: "grew the stack",
        }.get(origin, "mapped it")
        return self._event(lives.seq[life], role)

    def _event(self, seq: int, role: str) -> list[dict[str, Any]]:
        call = self._calls.get(seq)
        if call is not None:
            return [call_row(call, role)]
        task = self._tasks.get(seq)
        return [_task_row(task, role)] if task is not None else []

    def _fork(self, row: int) -> list[dict[str, Any]]:
        result = self.result
        e = unpack(int(result.evidence[row]))
        if e.forked is not Forked.PARENT:
            return []
        mm, time = int(result.run.faults.mm[row]), int(result.run.faults.time[row])
        forks = [t for t in result.facts.tasks if t.name == "fork" and t.mm == mm and t.time < time]
        forks = [t for t in forks if not int(t.args[2]) & 0x100]
        return [_task_row(forks[-1], "shared the page with a child")] if forks else []

    def on_page(self, addr: int, mm: int | None) -> list[int]:
        """Rows of all faults on the page of addr, in order of time."""
        return self.in_range(addr & ~0xFFF, (addr & ~0xFFF) + 0x1000, mm)

    def in_range(self, start: int, end: int, mm: int | None) -> list[int]:
        """Rows of all faults in [start, end), in order of time."""
        faults = self.result.run.faults
        hit = (faults.addr >= np.uint64(start)) & (faults.addr < np.uint64(end))
        if mm is not None:
            hit &= faults.mm == mm
        rows = np.flatnonzero(hit)
        return [int(r) for r in rows[np.argsort(faults.time[rows], kind="stable")]]


def call_row(call: Call, role: str) -> dict[str, Any]:
    """A system call as an evidence row."""
    args = ", ".join(f"{a:#x}" if a > 4096 else str(a) for a in call.args)
    result = f"{call.result:#x}" if call.result > 4096 else str(call.result)
    return {
        "seq": call.seq,
        "kind": "syscall",
        "role": role,
        "what": f"{call.name}({args}) = {result}" + (f" ({call.detail})" if call.detail else ""),
        "time_ns": call.start,
        "mm": call.mm,
        "tid": call.tid,
    }


def _task_row(task: Task, role: str) -> dict[str, Any]:
    extra = f" -> pid {task.args[0]}, mm {task.args[3]}" if task.name == "fork" else ""
    return {
        "seq": task.seq,
        "kind": "task",
        "role": role,
        "what": task.name + extra,
        "time_ns": task.time,
        "mm": task.mm,
        "tid": task.tid,
    }
