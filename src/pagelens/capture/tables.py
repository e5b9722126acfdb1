"""The tables of a capture: names, columns, Arrow schemas.

A table is a directory of Parquet parts inside NAME.plens/. The columns are data so that the documentation and
the schemas cannot drift apart; `events` comes from vm.events, where the model uses it too.
"""

from __future__ import annotations

from typing import Any

from pagelens.vm.accounting import SMAPS_FIELDS
from pagelens.vm.events import EVENTS, Column

_SNAPSHOT = Column("snapshot", "int32", "", "never", "row of `snapshots`")

TABLES: dict[str, tuple[Column, ...]] = {
    # `cause` lives in derived/.
    "events": tuple(c for c in EVENTS if c.name != "cause"),
    "stacks": (
        Column("stack_id", "int64", "", "never", "number of the stack"),
        Column("frames", "list<uint64>", "byte", "never", "user-space addresses, innermost first"),
        Column("complete", "bool", "", "frame pointers", "whether the outermost frame was reached"),
    ),
    "raw_stacks": (
        Column("stack_id", "int64", "", "never", "number of the stack"),
        Column("mm", "int32", "", "never", "address space number"),
        Column("pid", "int32", "", "never", "process"),
        Column("regs", "list<uint64>", "", "never", "17 registers by DWARF number"),
        Column("stack", "binary", "byte", "never", "memory from the stack pointer up"),
    ),
    "mms": (
        Column(
            "mm", "int32", "", "never", "address space number; 0 is the recorder's child before its execve"
        ),
        Column("time_ns", "int64", "ns", "never", "when it came to be"),
        Column("origin", "string", "", "never", "fork, exec or start (was there when the recording began)"),
        Column("pid", "int32", "", "never", "first process that used it"),
        Column(
            "parent_mm", "int32", "", "start", "fork: the space that was copied; exec: the one that was left"
        ),
        Column("path", "string", "", "fork", "program as given to execve; start: the command's name"),
    ),
    "tasks": (
        Column("pid", "int32", "", "never", "thread group id"),
        Column("tid", "int32", "", "never", "thread id"),
        Column("mm", "int32", "", "never", "address space at its end"),
        Column("end_ns", "int64", "ns", "runs on", "when it was gone"),
        Column("exit_code", "int32", "", "runs on", "as wait(2) gives it: code << 8, or the signal"),
        Column("min_flt", "int64", "faults", "never", "counted by the kernel while recorded"),
        Column("maj_flt", "int64", "faults", "never", "counted by the kernel while recorded"),
        Column("recorded", "int64", "faults", "never", "event rows"),
        Column("gup", "int64", "faults", "never", "made by the kernel for a call: counted, without event"),
        Column(
            "lost", "int64", "faults", "never", "events that the full ring refused, or the kernel skipped"
        ),
        Column("failed", "int64", "faults", "lean", "did not complete; not in the counters"),
        Column(
            "nofault", "int64", "faults", "lean", "kernel accesses that ask for refusal; not in the counters"
        ),
        Column("unexplained", "int64", "faults", "never", "min_flt + maj_flt - recorded - gup - lost"),
    ),
    "file_pages": (
        _SNAPSHOT,
        Column("dev", "string", "", "never", "device of the file, MM:mm in hex"),
        Column("inode", "uint64", "", "never", "inode of the file"),
        Column("path", "string", "", "never", "path of the file"),
        Column("start", "int64", "page", "never", "first cached page of the run, index in the file"),
        Column("count", "int64", "pages", "never", "pages of the run: in the page cache, mapped here or not"),
        Column("order", "int8", "", "not mapped here", "of the folio that holds the page (0: a single page)"),
    ),
    "snapshots": (
        _SNAPSHOT,
        Column("mm", "int32", "", "unknown", "address space number"),
        Column("pid", "int32", "", "never", "process that was read"),
        Column("time_ns", "int64", "ns", "never", "when reading began"),
        Column("moment", "string", "", "never", "exec, exit, attach, detach"),
        Column("method", "string", "", "never", "how it was read"),
        Column("complete", "bool", "", "never", "false: see notes"),
        Column("notes", "string", "", "nothing to say", "what is missing"),
        Column(
            "status",
            "string",
            "",
            "never",
            "JSON: memory fields of /proc/PID/status and stat, bytes or counts",
        ),
        Column("until_ns", "int64", "ns", "not known", "when reading ended"),
    ),
    "vmas": (
        _SNAPSHOT,
        Column("vma", "int32", "", "never", "index in the snapshot"),
        Column("start", "uint64", "byte", "never", "first address"),
        Column("end", "uint64", "byte", "never", "address behind the last"),
        Column("perms", "string", "", "never", "as in maps"),
        Column("offset", "uint64", "byte", "never", "into the file"),
        Column("dev", "string", "", "never", "MM:mm as in maps"),
        Column("inode", "uint64", "", "never", "0: no file"),
        Column("name", "string", "", "never", "path, [heap], … or empty"),
        Column("vm_flags", "string", "", "not read", "VmFlags of smaps, sorted, separated by blanks"),
    ),
    "pages": (
        _SNAPSHOT,
        Column("start", "uint64", "byte", "never", "first page of the run"),
        Column("count", "uint64", "pages", "never", "pages in the run"),
        Column("state", "uint32", "", "never", "bits of vm.PageState"),
        Column(
            "pfn",
            "list<uint64>",
            "",
            "hidden or not read",
            "frame of each anonymous page; 0: of a file, or none",
        ),
        Column("mapcount", "list<int64>", "", "not read", "kpagecount of each page"),
        Column("kflags", "list<uint64>", "", "not read", "kpageflags of each page"),
    ),
    "frames": (
        Column("mm", "int32", "", "never", "the address space that forked, see mms"),
        Column("time_ns", "int64", "ns", "never", "when reading began, the forking thread stopped"),
        Column("until_ns", "int64", "ns", "never", "when it ended"),
        Column("start", "uint64", "byte", "never", "first page of the run"),
        Column("count", "uint64", "pages", "never", "pages in the run"),
        Column("pfn", "list<uint64>", "", "never", "frame of each anonymous page; 0: of a file, or none"),
    ),
    "accounting": (
        _SNAPSHOT,
        Column("vma", "int32", "", "never", "index in the snapshot; -1: the whole space"),
        *(Column(f, "int64", "byte", "the kernel has no such field", f"smaps {f}") for f in SMAPS_FIELDS),
    ),
    "losses": (
        Column("time_ns", "int64", "ns", "never", "when it was noticed"),
        Column("what", "string", "", "never", "ring, missed, disk, max-size, snapshot, task, spool"),
        Column("count", "int64", "", "never", "how many"),
        Column("note", "string", "", "never", "what that means"),
    ),
}

# Few distinct values: stored once a part.
_DICTIONARY = {
    ("events", "kind"),
    ("events", "name"),
    ("events", "detail"),
    ("vmas", "perms"),
    ("vmas", "name"),
}


def schema(table: str) -> Any:
    """pyarrow.Schema of a table."""
    import pyarrow as pa

    types = {
        "bool": pa.bool_(),
        "string": pa.string(),
        "list<uint64>": pa.list_(pa.uint64()),
        "binary": pa.binary(),
        "list<int64>": pa.list_(pa.int64()),
    }
    fields = []
    for column in TABLES[table]:
        kind = types[column.type] if column.type in types else getattr(pa, column.type)()
        if (table, column.name) in _DICTIONARY:
            kind = pa.dictionary(pa.int32(), pa.string())
        fields.append(pa.field(column.name, kind))
    return pa.schema(fields)
