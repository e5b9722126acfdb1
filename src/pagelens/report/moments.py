"""Moments of a capture: the map at a time or event, and each change of it (`map --at`, `map --changes`)."""

from __future__ import annotations

import re
from typing import Any

from pagelens.capture.reader import Capture
from pagelens.capture.spaces import Change, Spaces, vma_list
from pagelens.vm.errors import UsageError
from pagelens.vm.regions import Evidence, Region, name_regions
from pagelens.vm.snapshot import Snapshot

_TIME = re.compile(r"^\+?(\d+(?:\.\d+)?)(ns|us|µs|ms|s)?$")
_SCALE = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "": 1_000_000_000}


def began(capture: Capture) -> int:
    """CLOCK_MONOTONIC ns of the program's execve, or of when we attached: times of people count from there, and not
    from when pagelens began to load its recorder, a second before on a busy machine."""
    rows = capture.table("mms", ["origin", "time_ns"]).to_pylist()
    times = [int(r["time_ns"]) for r in rows if r["origin"] in ("exec", "start")]
    return min(times, default=int(capture.meta.get("started_ns") or 0))


def parse_moment(capture: Capture, text: str) -> tuple[int, int | None]:
    """(time in ns, mm or None) of "#SEQ" (an event) or of a time since the start ("1.5", "20ms").

    UsageError for anything else, and for an event that is not there.
    """
    if text.startswith("#") and text[1:].isdigit():
        import pyarrow.compute as pc

        table = capture.events(["seq", "time_ns", "mm"])
        rows = table.filter(pc.equal(table.column("seq"), int(text[1:]))).to_pylist()
        if not rows:
            raise UsageError(f"the capture has no event {text}")
        return int(rows[0]["time_ns"]), rows[0]["mm"]
    match = _TIME.match(text)
    if not match:
        raise UsageError(f"not a moment: {text!r} (examples: 1.5, 20ms since the start; #1234 an event)")
    return began(capture) + int(float(match.group(1)) * _SCALE[match.group(2) or ""]), None


def main_mm(capture: Capture) -> int:
    """The address space of the recorded program: the one attached to, else the first that execve made."""
    attached = [r["mm"] for r in capture.snapshot_rows() if r["moment"] == "attach" and r["mm"] is not None]
    if attached:
        return int(attached[0])
    rows = sorted(capture.table("mms").to_pylist(), key=lambda r: r["time_ns"])
    if not rows:
        raise UsageError(f"{capture.path} has no address space")
    return int(next((r["mm"] for r in rows if r["origin"] == "exec"), rows[0]["mm"]))


def snapshot_of(capture: Capture, mm: int, moment: str | None = None) -> Snapshot:
    """The last snapshot of `mm`, or the one at `moment` (exec, exit, attach, detach)."""
    rows = [r for r in capture.snapshot_rows() if r["mm"] == mm and moment in (None, r["moment"])]
    if not rows:
        own = sorted({r["moment"] for r in capture.snapshot_rows() if r["mm"] == mm})
        others = sorted({int(r["mm"]) for r in capture.snapshot_rows() if r["mm"] is not None})
        listed = f"it has: {', '.join(own)}" if own else f"those with snapshots: mm {_few(others)}"
        raise UsageError(
            f"no snapshot {moment or ''} of mm {mm} in the capture ({listed})".replace("  ", " ")
        )
    return capture.snapshot(max(rows, key=lambda r: r["time_ns"])["snapshot"])


def _few(numbers: list[int], most: int = 12) -> str:
    """Numbers for a sentence: not all of hundreds."""
    if not numbers:
        return "none"
    rest = len(numbers) - most
    return ", ".join(map(str, numbers[:most])) + (f" and {rest} others" if rest > 0 else "")


MOMENTS = ("exec", "exit", "attach", "detach")


def ends(capture: Capture, mm: int) -> tuple[str, str]:
    """The first and the last recorded moment of an address space: ("exec", "exit"), ("attach", "detach"), …

    UsageError where fewer than two snapshots of it are in the capture.
    """
    rows = sorted((r for r in capture.snapshot_rows() if r["mm"] == mm), key=lambda r: r["time_ns"])
    if len(rows) < 2:
        raise UsageError(
            f"the capture has {len(rows) or 'no'} snapshot of mm {mm}: a diff needs two moments (see run --snapshot)"
        )
    return rows[0]["moment"], rows[-1]["moment"]


def _since(capture: Capture, time: int) -> str:
    return f"{(time - began(capture)) / 1e6:,.3f} ms after the start"


def look(capture: Capture, mm: int | None, at: str | None) -> tuple[Snapshot, list[Region], list[str]]:
    """Snapshot and regions of a capture: recorded (at None: the last; exec, exit, …) or replayed (time,
    event)."""
    if at is None or at in MOMENTS:
        chosen = main_mm(capture) if mm is None else mm
        shot = snapshot_of(capture, chosen, at)
        # Contents are not in a capture, so stacks are known by the calls that mapped them.
        _, stacks = vma_list([a for a in Spaces(capture).at(chosen, shot.time_ns) if a.stack])
        evidence = Evidence((*image_evidence(shot), *stacks.tenants))
        return shot, name_regions(shot.vmas, evidence), list(shot.notes)
    time, owner = parse_moment(capture, at)
    chosen = mm if mm is not None else owner if owner is not None else main_mm(capture)
    spaces = Spaces(capture)
    if chosen not in spaces.mms:
        raise UsageError(f"the capture has no address space {chosen} (there are: {_few(spaces.mms)})")
    vmas, evidence = vma_list(spaces.at(chosen, time))
    if not len(vmas):
        raise UsageError(f"nothing was mapped in address space {chosen} at {at}: it did not exist then")
    row = next(r for r in capture.table("mms").to_pylist() if r["mm"] == chosen)
    pid, birth = row["pid"], int(row["time_ns"])
    if row["origin"] != "start" and time < birth:
        raise UsageError(f"address space {chosen} came to be later than {at}: {_since(capture, birth)}")
    ended = [
        r["time_ns"]
        for r in capture.snapshot_rows()
        if r["mm"] == chosen and r["moment"] in ("exit", "detach")
    ]
    if ended and time > max(ended):
        spaces.notes.append(f"as it was last: the recording of it ended {_since(capture, max(ended))}")
    method = f"replayed from recorded calls ({spaces.agreement()})"
    shot = Snapshot(pid, time, vmas, method=method, complete=not spaces.notes, notes=tuple(spaces.notes))
    return shot, name_regions(vmas, evidence), list(spaces.notes)


def image_evidence(shot: Snapshot) -> Any:
    """bss and relro of the files in a recorded snapshot, where the files are still there."""
    from pagelens.linux import elf
    from pagelens.linux.regions import image_tenants

    return image_tenants(shot.vmas, lambda vma: elf.read(vma.name.removesuffix(" (deleted)"), vma.inode))


def change_rows(capture: Capture, mm: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of `map --changes`, of one address space or of all, in order of time; and notes."""
    spaces = Spaces(capture)
    if mm is not None and mm not in spaces.mms:
        raise UsageError(f"the capture has no address space {mm} (there are: {_few(spaces.mms)})")
    changes: list[Change] = []
    for one in spaces.mms if mm is None else [mm]:
        changes += spaces.changes(one)
    changes.sort(key=lambda c: (c.time_ns, c.seq))
    start = began(capture)
    rows = [
        {
            "at": c.time_ns - start,
            "event": c.seq,
            "mm": c.mm,
            "tid": c.tid,
            "call": c.call,
            "effect": c.note,
            "gone": [str(v) for v in c.gone],
            "came": [str(v) for v in c.came],
        }
        for c in changes
    ]
    return rows, [f"replayed: {spaces.agreement()}", *spaces.notes]
