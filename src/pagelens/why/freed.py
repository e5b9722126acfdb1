"""Pages that MADV_FREE had given away, and that were read again: the zero page, if the kernel had taken them.

A write takes the advice back, a read does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.why.evidence import Area, Forked, Guarded, Prior
from pagelens.why.history import History
from pagelens.why.replay import Replayed, state_column

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]


def zeroed_by_read(run: Replayed, past: History, prior: I64, guarded: I64, rewrites: Bool) -> None:
    """prior becomes ZERO where a read had found the page gone, here or in the process that fork had it from.

    rewrites: completed writes to present pages."""
    faults = run.faults
    rows = np.flatnonzero(rewrites & (prior == Prior.ANON) & (past.source >= 0))
    back = past.source[rows]
    read = ((faults.error[back] & 3) == 0) & (faults.error[back] >= 0) & ~faults.major[back]
    rows, back = rows[read], back[read]
    anon = state_column(run.lives, run.state[rows], "area", int(Area.UNMAPPED)) == Area.ANON
    free = state_column(run.lives, run.state[back], "free_time", -1)
    owned = state_column(run.lives, run.state[rows], "populated_own", -1)
    since = np.maximum(past.own[back], owned)
    zero = rows[anon & (free > since) & (free < faults.time[back])]
    prior[zero], guarded[zero] = int(Prior.ZERO), int(Guarded.NONE)


def perhaps_zero(run: Replayed, past: History, prior: I64, forked: I64, rewrites: Bool) -> Bool:
    """bool[n]: pages that MADV_PAGEOUT may have taken before a call populated them with reads: perhaps the zero page
    by now. Without a fork nothing else would have made the next write a fault: prior becomes ZERO."""
    out = np.zeros(len(prior), bool)
    rows = np.flatnonzero(rewrites & (prior == Prior.ANON))
    state, source = run.state[rows], past.source[rows]
    wrote = (source >= 0) & ((run.faults.error[source] & 2) != 0)
    own = np.where(source >= 0, np.where(wrote, run.faults.time[source], past.own[source]), -1)
    own = np.maximum(np.maximum(own, past.own[rows]), state_column(run.lives, state, "populated_own", -1))
    alone = forked[rows] == Forked.NONE
    given = np.where(
        alone,
        state_column(run.lives, state, "free_time", -1),
        state_column(run.lives, state, "freed_out", -1),
    )
    anon = state_column(run.lives, state, "area", int(Area.UNMAPPED)) == Area.ANON
    zero = anon & (given > own) & (state_column(run.lives, state, "populated_read", -1) > given)
    out[rows[zero & ~alone]] = True
    prior[rows[zero & alone]] = int(Prior.ZERO)
    return out
