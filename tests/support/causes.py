"""Joins the log of the oracle program (subjects/causes_oracle.c) with the verdicts on a capture of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from pagelens.why.classified import Classified


@dataclass
class Joined:
    """right, wrong: by true cause, (true cause, verdicts). ambiguous: accesses whose verdict is ambiguous in
    outcome or cause. races: (page-writers, verdicts) of the accesses that race on purpose."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)
    ambiguous: int = 0
    races: list[list[str]] = field(default_factory=list)

    @property
    def accesses(self) -> int:
        return sum(self.right.values()) + sum(self.wrong.values())


def join(result: Classified, log: Path) -> Joined:
    """A log line `tid before after addr cause faults` must be matched by exactly `faults` faults of that
    thread, on that page, between before and after, with that cause."""
    faults = result.run.faults
    on_page: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (tid, addr) in enumerate(zip(faults.tid.tolist(), faults.addr.tolist(), strict=True)):
        on_page[tid, addr >> 12].append(row)
    out = Joined()
    races: dict[tuple[int, int], list[str]] = defaultdict(list)
    for line in log.read_text().splitlines():
        tid, before, after, addr, expected = (int(x) for x in _numbers(line))
        cause = line.split()[4]
        rows = [r for r in on_page.get((tid, addr >> 12), ()) if before <= int(faults.time[r]) <= after]
        verdicts = [result.of(r) for r in rows]
        if expected < 0:
            races[addr >> 12, before // 5_000_000].extend(v.cause for v in verdicts)
            continue
        got = ",".join(v.cause for v in verdicts) or "none"
        if got == cause:
            out.right[cause] += 1
            out.ambiguous += any(v.confidence == "ambiguous" for v in verdicts)
        elif (cause, got) == ("file-page-cached", "file-page-disk") and verdicts[0].confidence == "likely":
            # The kernel counts a fault that waited for a lock as major too (FAULT_FLAG_TRIED).
            out.ambiguous += 1
            out.right[cause] += 1
        elif (cause, got) == ("write-notify", "write-notify,write-notify"):
            out.right[cause] += 1  # written back between the fault and the write that it was for
        elif got == "ambiguous" and cause in verdicts[0].candidates:
            out.ambiguous += 1
            out.right[cause] += 1
        else:
            out.wrong[cause, got] += 1
    out.races = list(races.values())
    return out


def _numbers(line: str) -> list[str]:
    words = line.split()
    return [*words[:4], words[5]]
