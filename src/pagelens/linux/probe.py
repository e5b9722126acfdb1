"""What works here: each capability is tried, never guessed from a version or a configuration.

A kernel without CONFIG_MEM_SOFT_DIRTY accepts the clear and shows clean pages for ever, a container may
forbid a system call that its kernel has, a file may exist and refuse to be read: only the trial tells. The
trials are in `trials` (and `trials_trace`); this module names them, says what each unlocks, and remembers the
answers.

`pagelens doctor` prints all of them; code asks `status("pagemap-scan")`, or `require("ptrace")` to raise the
error with the fix; tests ask `@pytest.mark.requires("…")`.
"""

from __future__ import annotations

import errno
import functools
import os
from dataclasses import dataclass

from pagelens.linux import trials, trials_trace
from pagelens.linux.trials import Outcome, Trial
from pagelens.vm.errors import CapabilityMissingError


@dataclass(frozen=True, slots=True)
class Capability:
    """One line of `doctor`. works: the trial succeeded. detail: what it showed. fix: exact, "" where it
    works."""

    name: str
    works: bool
    detail: str
    unlocks: str
    fix: str

    @property
    def status(self) -> str:
        """yes or no, for tables."""
        return "yes" if self.works else "no"


# name -> (trial, what it unlocks), in the order in which `doctor` prints them.
_TABLE: dict[str, tuple[Trial, str]] = {
    "root": (trials.root, "processes of other users, frames, system-wide recording"),
    "native": (trials.native_loads, "the C core: recording, handlers, trackers"),
    "other-users": (trials_trace.other_users, "map, pages, attach for processes of other users"),
    "pagemap": (trials.pagemap, "state of pages: map, pages, checkpoint"),
    "pagemap-scan": (trials.pagemap_scan, "quick page scans, huge and zero pages, dirty tracking by scan"),
    "pfn": (trials.pfn, "frame numbers: pages --frames, shared"),
    "kpagecount": (trials.kpagecount, "map counts of frames: pages --frames, shared"),
    "kpageflags": (trials.kpageflags, "frame flags: pages --frames, thp, shared"),
    "kpagecgroup": (trials.kpagecgroup, "which cgroup is charged for a frame"),
    "soft-dirty": (trials.soft_dirty, "dirty tracking without a fault handler; CRIU-style increments"),
    "guard-pages": (trials.guard_pages, "MADV_GUARD_INSTALL shown as guard pages"),
    "userfaultfd": (trials.userfaultfd, "user-level paging: pager, rollback --lazy, serve-pages"),
    "uffd-kernel-faults": (trials.uffd_kernel, "user-level paging of memory that the kernel touches"),
    "uffd-wp": (trials.uffd_wp, "write-protect tracking with a handler"),
    "uffd-wp-async": (trials.uffd_wp_async, "dirty tracking without a handler (0.7 µs a write)"),
    "uffd-minor": (trials.uffd_minor, "minor-fault paging of shared memory"),
    "perf-own": (trials_trace.perf_own, "faults of own processes, user mode"),
    "perf-kernel": (trials_trace.perf_kernel, "faults of own processes, those taken in the kernel too"),
    "perf-system": (trials_trace.perf_system, "recording of a whole process tree at little cost"),
    "tracefs": (trials_trace.tracefs, "memory system calls, error codes and latencies of faults"),
    "bpf": (trials_trace.bpf, "filtering in the kernel, gup faults counted per call"),
    "btf": (trials_trace.btf, "BPF programs that fit this kernel"),
    "libbpf": (trials_trace.libbpf, "loading the BPF object"),
    "libdw": (trials_trace.libdw, "call stacks without frame pointers (.eh_frame): run --detail full"),
    "ptrace": (trials_trace.ptrace, "snapshots at exec and exit, checkpoint, foreign dirty tracking"),
    "process-vm-readv": (trials_trace.process_vm_readv, "page contents: checkpoint, regions by allocator"),
    "pidfd-getfd": (trials_trace.pidfd_getfd, "userfaultfd of a foreign process"),
    "kcore": (trials_trace.kcore, "the kernel's own page tables and tasks, by drgn"),
    "thp": (trials.thp, "anonymous huge pages (THP)"),
    "hugetlb": (trials.hugetlb, "hugetlbfs pages"),
    "swap": (trials.swap, "swapped pages, MADV_PAGEOUT of anonymous memory"),
    "numa-balancing": (trials.numa_balancing, "NUMA hint faults (lockcheck)"),
    "ksm": (trials.ksm, "same-page merging"),
    "damon": (trials.damon, "access monitoring by the kernel"),
    "idle-pages": (trials.idle_pages, "idle page tracking: working sets"),
    "anon-names": (trials.anon_names, "names of anonymous memory in maps (PR_SET_VMA_ANON_NAME)"),
    "mseal": (trials.mseal, "sealed mappings"),
    "mlock": (trials.mlock, "locked memory (mlock)"),
}


# Under a seccomp filter (a container, a systemd unit) being root opens nothing: the call, and what lets it through.
# Docker's default profile ties calls to capabilities: moby's profiles/seccomp/default.json.
_SANDBOXED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("perf-own", "perf-kernel", "perf-system"), ("perf_event_open", "--cap-add PERFMON")),
    "bpf": ("bpf", "--cap-add BPF --cap-add PERFMON"),
    "ptrace": ("ptrace", "--cap-add SYS_PTRACE"),
    "process-vm-readv": ("process_vm_readv", "--cap-add SYS_PTRACE"),
    "pidfd-getfd": ("pidfd_getfd", "--cap-add SYS_PTRACE"),
    "tracefs": ("mount", "--cap-add SYS_ADMIN"),
    **dict.fromkeys(
        ("userfaultfd", "uffd-kernel-faults", "uffd-wp", "uffd-wp-async", "uffd-minor"),
        ("userfaultfd", "--security-opt seccomp=unconfined"),
    ),
    "mseal": ("mseal", "--security-opt seccomp=unconfined"),
    "mlock": ("mlock", "--security-opt seccomp=unconfined"),
}
# What a root without all rights lacks (a container's, a unit's with a bounding set): being root is no advice to it.
_LACKING = {
    "other-users": "SYS_PTRACE",
    "pfn": "SYS_ADMIN",
    "kpagecount": "SYS_ADMIN",
    "kpageflags": "SYS_ADMIN",
    "kpagecgroup": "SYS_ADMIN",
    "tracefs": "SYS_ADMIN",
    "bpf": "BPF --cap-add PERFMON",
    "kcore": "SYS_RAWIO",
}


def _filtered() -> bool:
    # Whether a seccomp filter is on us (proc(5), Seccomp: 2).
    try:
        with open("/proc/self/status") as stream:
            return any(line.split() == ["Seccomp:", "2"] for line in stream)
    except OSError:
        return False


def _fix(name: str, outcome: Outcome) -> str:
    if outcome.works:
        return ""
    refused = "not permitted" in outcome.detail or "not implemented" in outcome.detail  # what filters say
    if name in _SANDBOXED and refused and _filtered():
        call, option = _SANDBOXED[name]
        return f"the sandbox's seccomp filter must allow {call}: docker run {option}, SystemCallFilter={call} in a unit"
    if outcome.fix.startswith(trials.AS_ROOT) and os.geteuid() == 0 and name in _LACKING:
        names = [f"CAP_{word}" for word in _LACKING[name].split() if not word.startswith("-")]
        return f"docker run --cap-add {_LACKING[name]}, CapabilityBoundingSet={' '.join(names)} in a unit"
    return outcome.fix


@functools.cache
def status(name: str) -> Capability:
    """Try capability `name` (once a process). KeyError for a name that `doctor` does not list."""
    trial, unlocks = _TABLE[name]
    try:
        outcome = trial()
    except OSError as exc:
        fix = trials.NO_FIX if exc.errno == errno.ENOSYS else trials.AS_ROOT
        outcome = Outcome(False, exc.strerror or str(exc), fix)
    except CapabilityMissingError as exc:
        outcome = Outcome(False, str(exc).partition("; fix:")[0], exc.fix)
    return Capability(name, outcome.works, outcome.detail, unlocks, _fix(name, outcome))


def capabilities() -> list[Capability]:
    """All of them, tried."""
    return [status(name) for name in _TABLE]


def names() -> list[str]:
    """The names of all capabilities, without trying any."""
    return list(_TABLE)


def require(name: str, purpose: str = "") -> None:
    """Raise CapabilityMissingError, with the fix, where capability `name` is missing."""
    found = status(name)
    if not found.works:
        what = f"{purpose} needs {name}" if purpose else f"{name} is missing"
        raise CapabilityMissingError(f"{what} ({found.detail})", capability=name, fix=found.fix)


def capability_status(name: str) -> tuple[bool, str]:
    """(works, why or why not): what the tests' `requires` marker asks."""
    found = status(name)
    return found.works, found.detail
