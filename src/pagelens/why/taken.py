"""What had taken a page of a file or of shared memory away that no fault of its own had mapped: evidence columns.

`history` knows of pages by their faults. Here come those that a neighbour's fault had mapped (see `nearby`), and pages
of a private mapping that a hole took out of its file, which leaves copies where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.why.evidence import Area, Origin, Prior
from pagelens.why.history import History
from pagelens.why.nearby import AROUND, Around, last_drops
from pagelens.why.replay import Replayed, state_column
from pagelens.why.space import DROP_LINK, NO_LINK

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Taken:
    """Columns beside the faults. dropped: the page had been mapped until something took it away, and origin says what.
    paged: MADV_PAGEOUT may have done so before. holed: a hole in the file of a private mapping. marked: mapped when
    advice was given. near: by a neighbour."""

    dropped: Bool
    origin: I64
    paged: Bool
    holed: Bool
    marked: Bool
    near: Bool


def taken_away(run: Replayed, past: History, area: I64, prior: I64, present: Bool, mark_time: I64) -> Taken:
    """For every fault. area, prior, present, mark_time: columns."""
    n = len(prior)
    absent = ~present & ~run.faults.failed & np.isin(area, AROUND) & (past.life >= 0)
    hole = state_column(run.lives, run.state, "hole_time", -1)
    there = (prior == Prior.FILE) | (prior == Prior.POPULATED)
    holed = absent & (area == Area.FILE) & (hole > past.touch) & there
    dropped, origin = past.dropped | holed, past.origin.copy()
    paged = past.paged.copy()
    marked, near = np.zeros(n, bool), np.zeros(n, bool)
    rows = np.flatnonzero(absent & (prior == Prior.NONE))
    drops = last_drops(run.lives)[past.life[rows]]
    could = (drops >= 0) | (hole[rows] > drops) | (mark_time[rows] > drops)
    rows, drops = rows[could], drops[could]
    if len(rows):
        until = np.maximum(drops, np.maximum(hole[rows], mark_time[rows]))
        last = Around(run, past.life, past.copied).mapped(rows, until)
        seen_at = zip(
            rows[last >= 0].tolist(), last[last >= 0].tolist(), drops[last >= 0].tolist(), strict=True
        )
        for row, seen, drop in seen_at:
            if seen <= past.times[past.taken[row]] and past.taken[row] >= 0:
                continue  # taken away since, and by what `history` found
            near[row] = True
            if seen < drop:
                dropped[row] = True
                taker = _taker(run, int(past.life[row]), int(run.key[row]), seen)
                paged[row] = seen < run.lives.paged[taker]
                origin[row] = Origin.CUT if seen < run.lives.holed[taker] else run.lives.origin[taker]
            elif seen < hole[row] and not seen < mark_time[row] < hole[row]:
                holed[row] = dropped[row] = True
            else:
                marked[row] = True
                dropped[row] = False
    origin[holed] = int(Origin.CUT)
    return Taken(dropped, origin, paged, holed, marked, near)


def _taker(run: Replayed, life: int, key: int, since: int) -> int:
    # The first life of the page that a drop began after `since`.
    lives = run.lives
    found = life
    while lives.link[life] != NO_LINK and lives.time[life] > since:
        found = life if lives.link[life] == DROP_LINK else found
        key += lives.parent[life] - lives.key[life]
        life = int(np.searchsorted(lives.key, key, side="right")) - 1
    return found
