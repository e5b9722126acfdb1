"""`--backend all`: pagescan and soft-dirty on one process at once, page by page, and why they disagree.

The target is held still while both read and reset, so both answer for exactly the same interval; what is left
is what each believes. The answer that is listed is pagescan's; pages that only soft-dirty has are false dirt,
counted by the reason that soft-dirty's own knowledge gives (a vma flag, a huge page, or nothing known).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagelens.dirty import spans
from pagelens.dirty.epoch import Builder, Look, Semantics, Why
from pagelens.dirty.pagescan import Pagescan
from pagelens.dirty.soft_dirty import SoftDirty
from pagelens.dirty.spans import Spans
from pagelens.linux.hold import Held
from pagelens.linux.procfs import Process
from pagelens.vm.units import PAGE_SHIFT

_SHOWN = 64


class All:
    """Both backends over one process."""

    semantics = Semantics(
        name="all",
        scope="any other process",
        needs="what pagescan and soft-dirty need",
        extra=Pagescan.semantics.extra,
        too_much="as pagescan; soft-dirty's surplus is counted apart",
        misses="as pagescan",
        cost="both, and the target is held still at each look",
    )

    def __init__(self, proc: Process, scan: Pagescan, soft: SoftDirty, *, hold: bool = True) -> None:
        self._proc = proc
        self._scan = scan
        self._soft = soft
        self._hold = hold

    def arm(self) -> None:
        """Start both."""
        self._soft.arm()
        self._scan.arm()

    def forget(self) -> None:
        """The next look lists all contents."""
        self._scan.forget()
        self._soft.forget()

    def contents(self) -> Spans:
        """Pages with private contents as of the last look."""
        return self._scan.contents()

    def look(self) -> Look:
        """Both looks at one moment, and the difference in `details["disagree"]`."""
        if self._hold:
            with Held(self._proc.pid):
                look, pages, flagged = self._both()
        else:
            look, pages, flagged = self._both()
        other = self._soft.judge(pages, flagged)
        look.details["disagree"] = disagreement(look.builder, other.builder)
        look.details["soft_dirty_pages"] = other.builder.seen.pages
        look.notes += [f"soft-dirty: {note}" for note in other.notes if self._hold or "held" not in note]
        return look

    def _both(self) -> tuple[Look, Any, Spans]:
        # Soft-dirty is read first: pagescan's look registers what is new, the registered vma merges with its
        # neighbour, and since 6.19 the whole of it takes the new one's VM_SOFTDIRTY (VM_STICKY, mm/vma.c).
        pages, flagged = self._soft.read_step()
        look = self._scan.look()
        self._soft.clear_step()
        return look, pages, flagged

    def close(self) -> None:
        """Stop both."""
        self._scan.close()
        self._soft.close()


def disagreement(scan: Builder, soft: Builder) -> list[dict[str, Any]]:
    """[{"only", "reason", "pages", "ranges"}]: pages that one lists and the other does not, by the reason that
    the one gives. ranges: [["0x…", pages]], at most 64."""
    out: list[dict[str, Any]] = []
    for name, one, other in (("pagescan", scan, soft.seen), ("soft-dirty", soft, scan.seen)):
        start, count, why = one.columns()
        for reason in Why:
            mask = why == reason
            if not mask.any():
                continue
            end = start[mask] + (count[mask] << np.uint64(PAGE_SHIFT))
            only = spans.minus(spans.joined(start[mask], end), other)
            if only:
                ranges = [[f"{s:#x}", (e - s) >> PAGE_SHIFT] for s, e in only.pairs()[:_SHOWN]]
                out.append(
                    {"only": name, "reason": reason.name.lower(), "pages": only.pages, "ranges": ranges}
                )
    return out
