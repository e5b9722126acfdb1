"""Event columns: what the recorder writes and the model emits, one row an event.

A schema is data, so that the docs table, the Parquet schema and the model's events cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: name, Arrow type name, unit, when it is null, meaning."""

    name: str
    type: str
    unit: str
    null: str
    doc: str


KINDS = ("fault", "syscall", "task", "switch", "daemon")

EVENTS: tuple[Column, ...] = (
    Column("seq", "int64", "", "never", "order in the capture; ties in time_ns are kept apart by it"),
    Column(
        "time_ns", "int64", "ns", "never", "CLOCK_MONOTONIC: fault done, call entered, task event, switch in"
    ),
    Column("mm", "int32", "", "daemon events of no one address space", "address space number in the capture"),
    Column("pid", "int32", "", "never", "thread group id in the recorder's pid namespace"),
    Column("tid", "int32", "", "never", "thread id"),
    Column("cpu", "int16", "", "never", "CPU"),
    Column("kind", "string", "", "never", "fault, syscall, task, switch or daemon"),
    Column("name", "string", "", "faults", "system call; fork, exec, exit, start; in, out; tracepoint"),
    Column("addr", "uint64", "byte", "not a fault", "faulting address, exact where the kernel gives it"),
    Column("ip", "uint64", "byte", "no user frame", "instruction in user space that led here"),
    Column(
        "user_mode",
        "bool",
        "",
        "not a fault",
        "fault taken in user mode (else in the kernel, for in_syscall)",
    ),
    Column("error_code", "int32", "", "not a fault; --detail lean", "x86 page-fault error code at entry"),
    Column("major", "bool", "", "not a completed fault", "counted in maj_flt"),
    Column("failed", "bool", "", "not a fault", "did not complete: signal, or a kernel access that gave up"),
    Column("latency_ns", "int64", "ns", "--detail lean; call never returned", "entry to completion"),
    Column(
        "new_pages",
        "int8",
        "pages",
        "not a completed write to a present page; --detail lean; not BPF",
        "taken by the kernel for it: 1, the page was copied; 0, it was made writable (reused)",
    ),
    Column(
        "in_syscall", "int16", "", "not in a system call", "number of the system call that the thread was in"
    ),
    Column(
        "args",
        "list<uint64>",
        "",
        "faults, switches",
        "arguments of the system call or task event; a userfaultfd ioctl's 3 to 5: first words of its "
        "structure; a write's to clear_refs 1: the digit; a write's to mem 3: the address",
    ),
    Column(
        "result", "int64", "", "faults; call never returned", "return value, -errno on failure; exit code"
    ),
    Column(
        "gup",
        "int64",
        "faults",
        "not a system call or exit",
        "faults that raised the counter without an event",
    ),
    Column(
        "detail", "string", "", "nothing to say", "path of exec, of the mapped file, of the daemon's target"
    ),
    Column("file_dev", "uint64", "", "no file", "st_dev of the file that mmap maps"),
    Column("file_inode", "uint64", "", "no file", "inode of the file that mmap maps"),
    Column("stack_id", "int64", "", "no stack recorded", "row of `stacks`"),
    Column("cause", "string", "", "until `why` has run", "verdict; lives in derived/, joined by `query`"),
)

# Arguments of task events, by name.
TASK_ARGS: dict[str, tuple[str, ...]] = {
    "fork": ("child_pid", "child_tid", "clone_flags", "child_mm"),
    "exec": ("old_mm", "new_mm"),
    "start": ("pid", "tid", "0", "mm"),
    "exit": ("min_flt", "maj_flt", "recorded", "gup"),
}
