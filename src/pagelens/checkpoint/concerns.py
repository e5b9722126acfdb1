"""What has changed since a checkpoint that memory and registers alone cannot bring back.

Found while the process is held and before anything is touched. Each concern has a kind; rollback refuses all
kinds that the caller did not accept. What cannot be seen from outside (bytes that went through a socket or a
pipe, a signal that was delivered and whose effect is in memory only) is a note, not a concern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagelens.checkpoint.image import OpenFile, ProcessState
from pagelens.vm.errors import UsageError

KINDS: dict[str, str] = {
    "threads": "threads began or ended: they cannot be made or unmade",
    "children": "child processes began or ended",
    "files": "descriptors were opened, closed or replaced",
    "offsets": "file offsets moved",
    "signals": "signals that were queued have been delivered since, or their handling has changed",
    "identity": "user, group or working directory changed",
    "shared": "shared memory changed that others map or have open too, or that is read-only here, or the kernel's",
}


@dataclass(frozen=True, slots=True)
class Concern:
    """kind: one of KINDS. text: what differs, in one clause."""

    kind: str
    text: str


def compare(then: ProcessState, now: ProcessState) -> tuple[list[Concern], list[str]]:
    """(concerns, notes). Raises UsageError where `now` is not the process that was saved."""
    if (then.pid, then.starttime) != (now.pid, now.starttime):
        raise UsageError(
            f"the checkpoint is of process {then.pid} ({then.comm}, started at tick {then.starttime}), "
            f"not of {now.pid} ({now.comm}, {now.starttime})"
        )
    if then.exe != now.exe or then.auxv != now.auxv:
        raise UsageError(
            f"process {now.pid} has called exec since the checkpoint: {then.exe} became {now.exe}"
        )
    concerns: list[Concern] = []
    before, after = {t.tid for t in then.threads}, {t.tid for t in now.threads}
    if after - before:
        concerns.append(Concern("threads", f"threads began: {_list(after - before)}"))
    if before - after:
        concerns.append(Concern("threads", f"threads ended: {_list(before - after)}"))
    ours = {t.tid: t for t in now.threads}
    for thread in then.threads:
        other = ours.get(thread.tid)
        if other is not None and other.rseq != thread.rseq:
            concerns.append(
                Concern("threads", f"thread {thread.tid} was just starting (it had no rseq area yet)")
            )
    born, gone = set(now.children) - set(then.children), set(then.children) - set(now.children)
    if born:
        concerns.append(Concern("children", f"children began: {_list(born)}"))
    if gone:
        concerns.append(Concern("children", f"children ended and were waited for: {_list(gone)}"))
    concerns += _files(then.files, now.files)
    concerns += _signals(then, now)
    for name in ("uid", "gid", "cwd"):
        if getattr(then, name) != getattr(now, name):
            concerns.append(
                Concern("identity", f"{name} changed from {getattr(then, name)} to {getattr(now, name)}")
            )
    notes = []
    streams = sorted(
        {f.target.partition(":")[0] for f in now.files if f.target.startswith(("socket:", "pipe:"))}
    )
    if streams:
        notes.append(
            f"bytes that went through its {' and '.join(f'{s}s' for s in streams)} stay as they went"
        )
    return concerns, notes


def listed(found: Sequence[Concern]) -> list[str]:
    """For an error: each with its kind; of more than three of a kind the first three, and how many more."""
    out = []
    for kind in KINDS:
        texts = [c.text for c in found if c.kind == kind]
        if len(texts) > 4:
            texts = [*texts[:3], f"and {len(texts) - 3} more"]
        out += [f"{text} [{kind}]" for text in texts]
    return out


def _list(numbers: set[int]) -> str:
    shown = sorted(numbers)
    return ", ".join(map(str, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _files(then: tuple[OpenFile, ...], now: tuple[OpenFile, ...]) -> list[Concern]:
    before, after = {f.fd: f for f in then}, {f.fd: f for f in now}
    out = []
    for fd in sorted(before.keys() | after.keys()):
        old, new = before.get(fd), after.get(fd)
        if old is None and new is not None:
            out.append(Concern("files", f"descriptor {fd} was opened ({new.target})"))
        elif new is None and old is not None:
            out.append(Concern("files", f"descriptor {fd} was closed ({old.target})"))
        elif old is not None and new is not None:
            if (old.dev, old.inode) != (new.dev, new.inode) or old.target.split(" (del")[
                0
            ] != new.target.split(" (del")[0]:
                out.append(Concern("files", f"descriptor {fd} was {old.target} and is {new.target}"))
            elif old.pos != new.pos:
                out.append(
                    Concern("offsets", f"offset of descriptor {fd} ({new.target}) {old.pos} -> {new.pos}")
                )
            elif old.flags != new.flags:
                out.append(Concern("files", f"flags of descriptor {fd} {old.flags:#o} -> {new.flags:#o}"))
    return out


def _signals(then: ProcessState, now: ProcessState) -> list[Concern]:
    out = []
    queued = then.signals["ShdPnd"] & ~now.signals["ShdPnd"]
    for thread in then.threads:
        for info in thread.pending:
            queued |= 1 << (int.from_bytes(info[:4], "little") - 1)
    still = now.signals["ShdPnd"]
    for thread in now.threads:
        for info in thread.pending:
            still |= 1 << (int.from_bytes(info[:4], "little") - 1)
    if queued & ~still:
        out.append(Concern("signals", f"delivered since: signals {_list(_numbers(queued & ~still))}"))
    for name, what in (("SigIgn", "ignored"), ("SigCgt", "handled")):
        if then.signals[name] != now.signals[name]:
            changed = then.signals[name] ^ now.signals[name]
            out.append(Concern("signals", f"whether signals {_list(_numbers(changed))} are {what} changed"))
    return out


def _numbers(mask: int) -> set[int]:
    return {bit + 1 for bit in range(64) if mask >> bit & 1}
