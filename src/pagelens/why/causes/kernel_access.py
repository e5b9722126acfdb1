"""Access by the kernel: a system call read or wrote user memory (copy_to_user and the like), or a signal
frame was pushed. Who touched the page is the cause; what the page needed (first write, copy …) stands beside
it as `page`."""

from __future__ import annotations

from pagelens.why.causes._rule import Finding, Rule
from pagelens.why.evidence import Evidence


def _holds(e: Evidence) -> Finding | None:
    if e.user or e.failed:
        return None
    if e.by_exec:
        return Finding("taken by the kernel in execve, while it set up the new program")
    if e.in_call:
        return Finding("taken by the kernel within a system call")
    return Finding("taken by the kernel outside a system call: signal frame, rseq, or exit of a thread")


RULE = Rule(
    "kernel-access",
    "the kernel accessed the page for a system call",
    "reuse I/O buffers instead of fresh ones; read straight into memory that is populated already",
    _holds,
)
