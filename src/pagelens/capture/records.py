"""The spool's rows as numpy dtypes: the mirror of native/bpf/record.h and native/ring/drain.h.

A test compares the sizes with those that the C core reports.
"""

from __future__ import annotations

import enum

import numpy as np


class Kind(enum.IntEnum):
    """enum pl_kind."""

    FAULT = 1
    SYSCALL = 2
    FORK = 3
    EXEC = 4
    EXIT = 5
    SWITCH = 6
    DAEMON = 7
    START = 8


class Flag(enum.IntFlag):
    """pl_head.flags."""

    USER = 1
    MAJOR = 2
    FAILED = 4
    LATENCY = 8
    ERROR = 16
    COMPAT = 32
    OUT = 64
    FILE = 128
    # Of calls:
    VECTORS = 64
    # Of faults:
    NEW_PAGE = 32
    WATCHED = 128


_HEAD = [
    ("kind", "u1"),
    ("flags", "u1"),
    ("nframes", "u1"),
    ("ntext", "u1"),
    ("nr", "i2"),
    ("cpu", "u2"),
    ("pid", "u4"),
    ("tid", "u4"),
    ("mm", "u4"),
    ("extra", "u4"),
    ("time_ns", "i8"),
    ("latency_ns", "i8"),
    ("ip", "u8"),
]
FAULT = np.dtype([*_HEAD, ("addr", "u8"), ("stack_id", "i8")])
CALL = np.dtype(
    [
        *_HEAD,
        ("result", "i8"),
        ("args", "u8", (6,)),
        ("dev", "u8"),
        ("ino", "u8"),
        ("stack_id", "i8"),
        ("text_offset", "u8"),
    ]
)
NO_MM = 0xFFFFFFFF  # head.mm: of no recorded address space
# struct pl_spool_raw: a stack that is still to be unwound.
RAW = np.dtype(
    [
        ("stack_id", "i8"),
        ("mm", "u4"),
        ("pid", "u4"),
        ("length", "u4"),
        ("unused", "u4"),
        ("regs", "u8", (17,)),
        ("stack", "u1", (1024,)),
    ]
)
# By result of a DAEMON record: enum pl_daemon.
DAEMONS = {
    1: "khugepaged_scan",
    2: "collapse_huge_page",
    3: "migrate_pages",
    4: "compaction",
    5: "direct_reclaim",
    6: "writeback",
    7: "kswapd",
}
EVENT_KIND = {
    Kind.FAULT: "fault",
    Kind.SYSCALL: "syscall",
    Kind.FORK: "task",
    Kind.EXEC: "task",
    Kind.EXIT: "task",
    Kind.START: "task",
    Kind.SWITCH: "switch",
    Kind.DAEMON: "daemon",
}
TASK_NAME = {Kind.FORK: "fork", Kind.EXEC: "exec", Kind.EXIT: "exit", Kind.START: "start"}
# What `collect` writes: a call record without the spool's columns.
BARE_CALL = np.dtype([(name, *rest) for name, *rest in CALL.descr if name not in ("stack_id", "text_offset")])
# Arguments that a record of each kind carries.
ARGUMENTS = {Kind.SYSCALL: 6, Kind.FORK: 4, Kind.EXEC: 2, Kind.EXIT: 4, Kind.DAEMON: 4, Kind.START: 4}
