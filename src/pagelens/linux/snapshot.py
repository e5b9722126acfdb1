"""Take a Snapshot of a live process.

The target is not stopped: a snapshot costs it nothing but the locks that reading /proc takes. Whether it ran
meanwhile is measured (the run time of every thread, before and after) and said; a caller that needs a still
target stops it first.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from pagelens.linux import frames as kframes
from pagelens.linux import maps, pagemap, smaps
from pagelens.linux.procfs import Process
from pagelens.vm.accounting import Accounting
from pagelens.vm.errors import PagelensError, TargetGoneError
from pagelens.vm.pages import PageRuns, PageState
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import AddrRange
from pagelens.vm.vma import VmaList


def take(
    pid: int | Process,
    *,
    pages: bool = True,
    accounting: bool = True,
    frames: bool = False,
    pfns: bool = False,
    within: AddrRange | None = None,
) -> Snapshot:
    """The address space of a process now.

    pages: read page states (of the whole address space, or of `within`). accounting: read smaps (then vmas
    carry their VmFlags) rather than maps. frames: also frame numbers, map counts and frame flags (needs
    CAP_SYS_ADMIN). pfns: only frame numbers, and only those of anonymous pages; none where they are hidden.
    """
    if isinstance(pid, Process):
        return _take(pid, pages, accounting, frames, pfns, within)
    with Process.open(pid) as proc:
        return _take(proc, pages, accounting, frames, pfns, within)


def frames_of(proc: Process, most: int) -> tuple[int, int, PageRuns] | None:
    """(ns before, ns after, runs with frame numbers) of the anonymous pages of private mappings.

    Without frame numbers where they are hidden (needs CAP_SYS_ADMIN); None where more than `most` pages are resident.
    """
    resident = int(proc.read("statm").split()[1])
    if resident > most:
        return None
    began = time.monotonic_ns()
    vmas = VmaList(v for v in maps.read(proc) if not v.shared)
    runs = _anonymous_frames(pagemap.read(proc, vmas, pfns=True, most=pagemap.MOST).runs)
    if runs.pfn is None:
        return began, time.monotonic_ns(), runs
    return began, time.monotonic_ns(), runs.where(PageState.PRESENT, PageState.FILE | PageState.ZERO)


snapshot = take  # its name in the Python API: pagelens.snapshot(pid)


def _take(
    proc: Process, pages: bool, accounting: bool, frames: bool, pfns: bool, within: AddrRange | None
) -> Snapshot:
    began = time.monotonic_ns()
    before = _run_time(proc)
    account: Accounting | None = None
    notes: list[str] = []
    if accounting:
        vmas, account = smaps.read(proc)
        method = ["smaps"]
    else:
        vmas = maps.read(proc)
        method = ["maps"]
    if not len(vmas):
        raise TargetGoneError(f"process {proc.pid} has no memory any more (it is exiting)")
    runs: PageRuns | None = None
    whole = True
    if pages or frames:
        span = None if within is None else (within.start, within.end)
        table = pagemap.read(proc, vmas, within=span, pfns=frames or pfns, most=pagemap.MOST)
        runs = table.runs
        method.append(table.method)
        notes += table.notes
        whole = table.complete
        if frames:
            runs = kframes.annotate(runs)
            method.append("kpagecount+kpageflags")
            if runs.pfn is not None and len(runs.pfn) and not runs.pfn.any():
                notes.append("frame numbers are hidden (needs CAP_SYS_ADMIN)")
        elif pfns:
            runs = _anonymous_frames(runs)
    ran = _ran_meanwhile(before, _run_time(proc))
    if ran:
        notes.append(ran)
    return Snapshot(
        pid=proc.pid,
        time_ns=began,
        vmas=vmas,
        pages=runs,
        accounting=account,
        method="proc " + "+".join(method),
        complete=whole and not ran,
        notes=tuple(notes),
        until_ns=time.monotonic_ns(),
    )


def _anonymous_frames(runs: PageRuns) -> PageRuns:
    # Those of files and of the zero page are many, and say nothing of what fork shares.
    if runs.pfn is None or not runs.pfn.any():
        return replace(runs, pfn=None)
    others = (runs.states() & np.uint32(PageState.FILE | PageState.ZERO)) != 0
    return replace(runs, pfn=np.where(others, np.uint64(0), runs.pfn))


def _run_time(proc: Process) -> dict[int, tuple[int, int]]:
    # tid -> (ns on a CPU, times it was given one): /proc/PID/task/TID/schedstat. Time alone is not enough: it
    # is only brought up to date at a tick or a switch.
    out = {}
    for tid in proc.tasks():
        try:
            fields = proc.read_task(tid, "schedstat").split()
            running = proc.stat(tid).state == "R"
            out[tid] = (int(fields[0]) if not running else -1, int(fields[2]))
        except (PagelensError, IndexError, ValueError):
            out[tid] = (-1, -1)  # going, or a kernel without schedstats: taken as having run
    return out


def _ran_meanwhile(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]) -> str:
    ran = [
        tid
        for tid in before.keys() | after.keys()
        if before.get(tid) != after.get(tid) or -1 in before.get(tid, ())
    ]
    if not ran:
        return ""
    return f"{len(ran)} of {len(before.keys() | after.keys())} threads ran while the snapshot was taken"
