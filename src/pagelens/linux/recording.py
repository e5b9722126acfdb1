"""A live recording by BPF: object, rings, drain, and the first task of the tree.

The recorded tree is a set of tasks marked in the kernel (task storage); see native/bpf/recorder.bpf.c for
why. Everything here hangs on descriptors of this process: when it is killed the kernel detaches all of it,
and the program goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pagelens.linux import bpf, perf, syscalls
from pagelens.linux.drain import Drain, DrainStats

# Programs of each level of detail.
_LEAN = ("fault_minor", "fault_major", "call_enter", "call_exit", "task_new", "task_exec", "task_switch")
_ALWAYS = (*_LEAN, "adopt", "collect", "leftover")
_ENTRIES = ("entry_user", "entry_kernel", "page_taken", "page_cut")
_OF_TASKS = ("task_new", "task_exec")
_DAEMONS = ("scan_pmd", "collapse", "migrate", "compaction", "reclaim", "kswapd", "writeback")
DETAILS = ("lean", "normal", "full")
_RINGS = 128 << 20  # bytes for the rings of all CPUs together: the drain may be kept from a CPU for a while
_TRIES = 5  # passes over the tasks, while some cannot be marked
MAX_FRAMES = 64


class _Settings(ctypes.Structure):
    # struct pl_settings of native/bpf/record.h.
    _fields_ = (
        ("stacks", ctypes.c_uint32),
        ("entry", ctypes.c_uint32),
        ("switches", ctypes.c_uint32),
        ("daemons", ctypes.c_uint32),
        ("raw", ctypes.c_uint32),
        ("batch", ctypes.c_uint32),
        ("pages", ctypes.c_uint32),
    )


class Totals(ctypes.Structure):
    """struct pl_totals of native/bpf/record.h: sums over the tasks that are gone."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "min_flt",
            "maj_flt",
            "recorded",
            "lost",
            "gup",
            "missed",
            "failed",
            "nofault",
            "tasks_started",
            "tasks_gone",
            "tasks_untracked",
            "lost_records",
            "next_mm",
            "pid_level",
            "stopped",
            "clear_refs",
            "mem",
            "learner",
            "learn",
            "adopted",
            "begun",
            "unmarked",
        )
    )


class _Task(ctypes.Structure):
    # struct pl_task: written once, to arm the first task.
    _fields_ = (
        ("state", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("mm", ctypes.c_uint32),
        ("counters", ctypes.c_uint64 * 8),
        ("pend", ctypes.c_uint64 * 4),
        ("enter", ctypes.c_uint64 * 7),
        ("nr", ctypes.c_int32),
        ("compat", ctypes.c_uint32),
        ("mm_ptr", ctypes.c_uint64),
        ("walking", ctypes.c_uint64),
        ("batch", ctypes.c_uint64 * 71),  # with its count
    )


_ARMED = 1


def default_ring(cpus: int) -> int:
    """Bytes of the ring of each CPU: 128 MiB for all together, 32 MiB at most and 4 MiB at least for each.

    A thread that does nothing but fault fills 30 to 60 MB a second.
    """
    return max(4 << 20, min(32 << 20, 1 << (_RINGS // max(1, cpus)).bit_length() - 1))


@dataclass
class Options:
    """What to record. ring_size: bytes per CPU, a power of two; 0: `default_ring`. calls: a tracer tells them
    (perf only)."""

    detail: str = "normal"
    ring_size: int = 0
    stacks: bool = True
    switches: bool = False
    calls: bool = False
    absent: list[str] = field(default_factory=list)


class BpfRecording:
    """Between construction and `close`, tasks that are marked as members are recorded into `spool`."""

    def __init__(self, options: Options, spool: Path) -> None:
        """Loads and attaches. CapabilityMissingError where the kernel or the privilege lacks something."""
        self.options = options
        lean = options.detail == "lean"
        cpus = perf.online_cpus()
        options.ring_size = options.ring_size or default_ring(len(cpus))
        self._rings = [-1] * (max(cpus) + 1)
        self._object = bpf.BpfObject()
        self._drain: Drain | None = None
        self._unmarked = 0
        try:
            obj = self._object
            options.absent = obj.select(_ALWAYS if lean else (*_ALWAYS, *_ENTRIES, *_DAEMONS))
            settings = obj.initial(".rodata", _Settings)
            settings.stacks = MAX_FRAMES if options.stacks and not lean else 0
            settings.raw = 1 if options.detail == "full" and options.stacks else 0
            settings.entry = 0 if lean else 1
            settings.batch = 1 if lean else 0
            settings.pages = 1 if "page_taken" in obj.loaded else 0
            settings.switches = 1 if options.switches else 0
            obj.set_max_entries("rings", len(self._rings))
            obj.load()
            outer = obj.map_fd("rings")
            for cpu in cpus:
                self._rings[cpu] = bpf.create_ring(options.ring_size)
                bpf.map_update(outer, ctypes.c_uint32(cpu), ctypes.c_uint32(self._rings[cpu]))
            wanted = obj.map_fd("wanted")
            for number, condition in syscalls.WANTED.items():
                bpf.map_update(wanted, ctypes.c_uint32(number), ctypes.c_uint8(condition))
            self._totals = obj.shared(".bss", Totals)
            self._totals.begun = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            self._drain = Drain(self._rings, options.ring_size, spool)
            for name in sorted(obj.loaded):
                if obj.sections[name].startswith("tp_btf/"):
                    obj.attach(name)
            for cpu in cpus:
                for name, config in (
                    ("fault_minor", perf.PAGE_FAULTS_MIN),
                    ("fault_major", perf.PAGE_FAULTS_MAJ),
                ):
                    obj.attach_perf(name, perf.open_fault_event(config, cpu))
            self._learn_files()
            self._drain.start()
        except BaseException:
            self.close()
            raise

    @property
    def drain(self) -> Drain:
        """The drain; RuntimeError after close."""
        if self._drain is None:
            raise RuntimeError("the recording is closed")
        return self._drain

    def arm(self, pid: int) -> None:
        """Make a task of ours (a HeldProgram) the root of the tree: recorded from its execve on."""
        task = _Task(state=_ARMED, pid=pid, tid=pid, nr=-1)
        pidfd = os.pidfd_open(pid)
        try:
            self._totals.tasks_started += 1
            bpf.map_update(self._object.map_fd("tasks"), ctypes.c_int(pidfd), task)
        finally:
            os.close(pidfd)

    def adopt(self, pids: Iterable[int]) -> int:
        """Mark processes that run already, with all their threads; returns how many tasks were new.

        Children that they start from now on follow by themselves.
        """
        targets = self._object.map_fd("targets")
        for pid in pids:
            bpf.map_update(targets, ctypes.c_uint32(pid), ctypes.c_uint8(1))
        before = int(self._totals.adopted)
        for _ in range(_TRIES):  # whoever used marks on this CPU may have been preempted amid it
            self._totals.unmarked = 0
            self._object.read_iterator("adopt")
            if not self._totals.unmarked:
                break
        self._unmarked += int(self._totals.unmarked)
        return int(self._totals.adopted) - before

    def collect(self) -> bytes:
        """End the recording of all tasks that still run; returns their counters as EXIT records (CALL rows
        without the spool's columns). They are then in `totals`."""
        self._totals.stopped = 1
        found = self._object.read_iterator("collect")
        if self.options.detail == "lean":
            self._grace()  # who was completing a fault then has put it into its batch
            self._object.read_iterator("leftover")
        # A task that is released already, but has not left its CPU for the last time, is in no list: it is
        # counted when it does (finish_task_switch), so we stay attached for it.
        until = time.monotonic() + 2
        while self.live_tasks() > 0 and time.monotonic() < until:
            time.sleep(0.001)
        # Likewise one whose last faults stand in its batch yet, or that was amid a fault: it is waited for.
        until = time.monotonic() + 0.5
        while self._untold() > 0 and time.monotonic() < until:
            time.sleep(0.002)
        return found

    def _untold(self) -> int:
        # Faults that the tasks which are gone count as recorded, and of which the drain knows nothing yet.
        told = self.drain.stats()
        return int(self._totals.recorded - told.faults - told.dropped_faults)

    def _grace(self) -> None:
        # An update of a map of maps, even to what it is, returns when no program runs any more that had begun before
        # (maybe_wait_bpf_programs, kernel/bpf/syscall.c).
        cpu, ring = next((cpu, ring) for cpu, ring in enumerate(self._rings) if ring >= 0)
        bpf.map_update(self._object.map_fd("rings"), ctypes.c_uint32(cpu), ctypes.c_uint32(ring))

    def _learn_files(self) -> None:
        # Writes of our own that change nothing (a refused one, an empty one) show the programs which files those are.
        self._totals.learner = os.getpid()
        for which, (name, data) in enumerate((("clear_refs", b"0"), ("mem", b"")), 1):
            # CONFIG_PROC_PAGE_MONITOR off: nobody can clear; /proc/PID/mem may be closed to writes.
            with contextlib.suppress(OSError):
                fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    self._totals.learn = which  # LEARN_REFS, LEARN_MEM
                    os.write(fd, data)
                finally:
                    self._totals.learn = 0
                    os.close(fd)

    def mm_of(self, pid: int) -> int | None:
        """Number of the address space that a recorded process uses now; None if it is not recorded."""
        task = _Task()
        pidfd = os.pidfd_open(pid)
        try:
            found = bpf.map_lookup(self._object.map_fd("tasks"), ctypes.c_int(pidfd), task)
        finally:
            os.close(pidfd)
        return int(task.mm) if found else None

    def live_tasks(self) -> int:
        """Recorded tasks that have not been switched away from for the last time."""
        return int(self._totals.tasks_started - self._totals.tasks_gone)

    def totals(self) -> dict[str, int]:
        """Sums over the tasks that are gone; and, of all tasks of the machine, the starts and execs (`skipped_tasks`)
        and the calls and entries of faults (`skipped_events`) for which the kernel did not run our program."""
        skipped = self._object.skipped()
        tasks = sum(skipped.get(name, 0) for name in _OF_TASKS)
        return {
            **{name: int(getattr(self._totals, name)) for name, *_ in Totals._fields_},
            "tasks_untracked": int(self._totals.tasks_untracked) + self._unmarked,
            "skipped_tasks": tasks,
            "skipped_events": sum(skipped.values()) - tasks,
        }

    def stats(self) -> DrainStats:
        """Figures of the drain."""
        return self.drain.stats()

    def detach(self) -> None:
        """No further event. The rings stay."""
        self._object.detach()

    def close(self) -> None:
        """Detach and free everything."""
        self._object.detach()
        if self._drain is not None:
            self._drain.stop()
            self._drain.free()
            self._drain = None
        for fd in self._rings:
            if fd >= 0:
                os.close(fd)
        self._rings = []
        self._object.close()
