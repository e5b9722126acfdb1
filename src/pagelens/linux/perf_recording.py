"""A live recording without BPF: inherited perf events, counters from exit stops.

The same interface as BpfRecording, for own processes of an ordinary user. Where perf is forbidden too (containers),
the counters are read all the same and nothing else is known of a fault: `events` is false. What perf does not tell:
faults taken in kernel mode (unless perf allows them), which calls shaped memory (what mmap, mprotect and brk left
behind is seen by MMAP2 records, and recorded as mmap), error codes, latencies, failed faults, gup. The kernel's
counters still tell how many faults there were, so the gap has a size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from pagelens.linux.calls import CallRecorder
from pagelens.linux.drain import Drain, DrainStats
from pagelens.linux.perf_tasks import (
    DEFAULT_RING,
    PerfTasks,
    PerfTotals,
    fault_counters,
    faults_visible,
    group_counters,
    kernel_faults_visible,
    most_ring,
)
from pagelens.linux.procfs import TaskStat, process_of
from pagelens.linux.recording import Options
from pagelens.vm.errors import TargetGoneError

ABSENT = [
    "system calls but for what they mapped",
    "error codes",
    "latencies",
    "failed faults",
    "gup",
    "context switches",
]


class PerfRecording:
    """Between construction and `close`, armed tasks and what they fork are recorded into `spool`."""

    def __init__(self, options: Options, spool: Path) -> None:
        """Opens nothing but the drain; `arm` opens the events. OSError where the spool cannot be written."""
        self.options = options
        self.kernel = kernel_faults_visible()
        self.events = self.kernel or faults_visible()
        absent = ABSENT[1:] if options.calls else ABSENT
        unseen = [] if self.kernel else ["faults in kernel mode"] if self.events else ["faults: only counted"]
        options.absent = [*absent, *unseen]
        self._root = 0
        self._started = False
        self._process: dict[int, int] = {}  # by thread, where a tracer tells of tasks
        self._adopted: dict[int, tuple[int, tuple[int, int]]] = {}
        self._live = self._live_min = self._live_maj = 0
        self._base = (0, 0)
        self.drain = Drain([], 4096, spool)
        # Without privilege the kernel limits what is mapped.
        most = most_ring() if self.kernel else DEFAULT_RING
        options.ring_size = options.ring_size or most
        try:
            self._perf = PerfTasks(
                self.drain,
                kernel=self.kernel,
                stacks=options.stacks and options.detail != "lean",
                calls=options.calls,
                ring_bytes=min(options.ring_size, most),
            )
        except BaseException:
            self.drain.free()
            raise
        self._calls = CallRecorder(self._perf, kernel=self.kernel) if options.calls else None

    def arm(self, pid: int) -> None:
        """Make a task of ours (a HeldProgram) the root of the tree: recorded from its execve on."""
        self._root = pid
        if self.events:
            self._perf.add(pid, pid, on_exec=True)
        else:
            self._perf.root(pid)
        self._base = fault_counters(pid, pid)
        self._perf.start()

    def adopt(self, pids: Iterable[int]) -> int:
        """Follow processes that run already, with all their threads; returns how many tasks were new.

        What a thread faults between the reading of its counters and the opening of its events is counted, not
        seen; what it starts from then on follows by itself.
        """
        new = 0
        for pid in pids:
            if not self.events and pid not in self._adopted:
                with contextlib.suppress(TargetGoneError):
                    self._adopted[pid] = (pid, group_counters(pid))
                    self._perf.root(pid)
                    new += 1
                continue
            for tid in _threads(pid) if self.events else ():
                if tid in self._adopted or (self._adopted and self._perf.followed(tid)):
                    continue
                try:
                    base = fault_counters(pid, tid)
                    self._perf.add(pid, tid)
                except TargetGoneError:
                    continue
                self._adopted[tid] = (pid, base)
                new += 1
                if len(self._adopted) == 1:
                    self._perf.start()
        return new

    def collect(self) -> int:
        """End the recording of all tasks that still run; returns how many. Their counters are then in `totals`."""
        self._perf.stop()
        processes = {pid for pid, _ in self._adopted.values()}
        for pid in () if self.events else processes:
            # The counters of a process hold those of its threads that are gone (wait4's, proc(5)).
            with contextlib.suppress(TargetGoneError):
                now, base = group_counters(pid), self._adopted[pid][1]
                self._live += 1
                self._live_min += now[0] - base[0]
                self._live_maj += now[1] - base[1]
        for pid in processes if self.events else ():
            for tid in _threads(pid):
                base = self._adopted.get(tid, (pid, (0, 0)))[1]
                try:
                    now = fault_counters(pid, tid)
                except TargetGoneError:
                    continue
                self._live += 1
                self._live_min += now[0] - base[0]
                self._live_maj += now[1] - base[1]
        return self._live

    def at_exec(self, tid: int) -> None:
        """The root's first exec stop: what it faulted before belongs to the launcher, not to the program (but
        for what execve itself did when the events were on already)."""
        if not self.events:
            self._perf.executed(tid, _executable(tid))
        if self._calls is not None:
            self._calls.gone(tid)  # its numbers are new
        if tid == self._root and not self._started:
            minor, major = fault_counters(tid, tid)
            self._base = (minor - self._perf.recorded(tid), major)
            self._started = True

    def at_task_exit(self, tid: int) -> None:
        """A thread's exit stop: the last moment at which its counters can be read without privilege."""
        if self._calls is not None:
            self._calls.gone(tid)
        try:
            minor, major = fault_counters(tid, tid)
        except TargetGoneError:
            return
        if tid == self._root:
            minor, major = minor - self._base[0], major - self._base[1]
        self._perf.counters(tid, max(0, minor), max(0, major))
        if not self.events:
            self._perf.ended(self._process.pop(tid, tid), tid)

    def waited(self, minor: int, major: int) -> None:
        """The root has been waited for, and nothing stopped at its end: wait4's counters hold those of all that it had
        waited for itself, and of its own few faults between `arm` and execve."""
        self._perf.executed(self._root, "")
        self._perf.counters(self._root, max(0, minor - self._base[0]), max(0, major - self._base[1]))
        self._perf.ended(self._root, self._root)

    def at_start(self, parent: int, tid: int) -> None:
        """A task was started by a thread that is stopped; perf, where we have it, tells that itself."""
        if not self.events:
            pid = process_of(tid)
            self._process[tid] = pid
            self._perf.started(pid, tid, (self._process.get(parent, parent), parent))

    def at_call(self, tid: int) -> None:
        """A thread's stop at the entry or the exit of a system call (options.calls), once the program has begun."""
        if self._calls is not None and self._started:
            self._calls.stop(tid)

    def mm_of(self, pid: int) -> int | None:
        """Number of the address space that a recorded process uses now (stop it first); None: not recorded."""
        return self._perf.mm(pid) or None

    def live_tasks(self) -> int:
        """Recorded tasks whose end has not been drained."""
        if self._adopted and not self.events:
            return sum(_runs(pid) for pid in self._adopted) - self._live
        totals = self._perf.totals()
        return int(totals.tasks_started - totals.tasks_gone) - self._live

    def totals(self) -> dict[str, int]:
        """Sums over the tasks that are gone, with the names of BpfRecording's."""
        t = self._perf.totals()
        known = dict.fromkeys(("missed", "failed", "tasks_untracked"), 0)
        names = [name for name, *_ in PerfTotals._fields_]
        sums = {name: int(getattr(t, name)) for name in names}
        sums["min_flt"] += self._live_min
        sums["maj_flt"] += self._live_maj
        return known | sums

    def stats(self) -> DrainStats:
        """Figures of the drain."""
        return self.drain.stats()

    def detach(self) -> None:
        """No further event."""
        self._perf.stop()

    def close(self) -> None:
        """Stop and free everything."""
        self._perf.stop()
        self._perf.close()
        self.drain.stop()
        self.drain.free()


def _executable(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    try:
        return TaskStat.parse(Path(f"/proc/{pid}/stat").read_bytes()).state not in "ZX"
    except OSError:
        return False


def _threads(pid: int) -> list[int]:
    try:
        return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []
