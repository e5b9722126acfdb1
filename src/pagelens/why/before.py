"""Sharing that forks before the recording had made: by the frames in the first snapshots of `attach --tree`.

Two processes whose first snapshots show the same frame shared that page then, and do until one of them has written or
dropped it, or has ended. A page that the kernel called exclusively mapped had no sharer at all. What is shared with a
process outside of the tree stays unknown.

Who is whose child is known by the parents that `attach` notes (meta `parents`): a page that a process shares with its
parent, or with a sister, came by fork; one that it shares with its children alone was its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import PageState
from pagelens.why.evidence import Forked, Sharers
from pagelens.why.facts import Facts
from pagelens.why.outcome import page_columns
from pagelens.why.replay import Replayed
from pagelens.why.sharing import FOREVER, Kin

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed


def shared_before(facts: Facts, run: Replayed, kin: Kin, rows: I64, when: I64) -> tuple[I64, I64]:
    """(Forked, Sharers) of each fault in `rows`, NONE and NA where the first snapshots do not say. when: ns of each."""
    role = np.full(len(rows), int(Forked.NONE), np.int64)
    share = np.full(len(rows), int(Sharers.NA), np.int64)
    tables = _tables(facts, run)
    above = _ancestors(facts)
    mms = run.faults.mm[rows]
    for mm in np.unique(mms).tolist():
        if mm not in tables:
            continue
        mine = np.flatnonzero(mms == mm)
        keys, frames, alone = tables[mm]
        at = np.minimum(np.searchsorted(keys, run.key[rows[mine]]), len(keys) - 1)
        known = keys[at] == run.key[rows[mine]]
        single = mine[known & alone[at]]
        role[single], share[single] = int(Forked.PARENT), int(Sharers.GONE)
        mine, at = mine[known & ~alone[at]], at[known & ~alone[at]]
        for other, (their_keys, their_frames, _) in tables.items():
            if other == mm or not len(mine):
                continue
            order = np.argsort(their_frames)
            place = np.minimum(np.searchsorted(their_frames[order], frames[at]), len(order) - 1)
            same = their_frames[order][place] == frames[at]
            if not same.any():
                continue
            here, key = mine[same], their_keys[order][place][same]
            alive = when[here] <= run.family.end.get(other, FOREVER)
            still = alive & kin.untouched(other, key, facts.first[other].time_ns, when[here])
            ours = other not in above.get(mm, ()) and mm in above.get(other, ())
            side = int(Forked.PARENT) if ours else int(Forked.CHILD)
            role[here] = np.maximum(role[here], side)  # CHILD where any sharer is no child of ours
            share[here[still]] = int(Sharers.LIVE)
            gone = here[~still]
            share[gone] = np.where(share[gone] == Sharers.LIVE, int(Sharers.LIVE), int(Sharers.UNCLEAR))
    return role, share


def _tables(facts: Facts, run: Replayed) -> dict[int, tuple[I64, I64, npt.NDArray[np.bool_]]]:
    # mm -> (keys, frames, exclusively mapped) of what was there before us.
    older = facts.settings.get("older")
    out = {}
    for mm in older if isinstance(older, frozenset) else ():
        first = facts.first.get(mm)
        if first is None or first.pages is None or first.pages.pfn is None or mm not in run.first_keys:
            continue
        keys, frames, state = page_columns(first.pages, run.first_keys[mm][1])
        if len(keys):
            out[mm] = (keys, frames, (state & np.uint32(PageState.EXCLUSIVE)) != 0)
    return out


def _ancestors(facts: Facts) -> dict[int, set[int]]:
    # mm -> those of its ancestors that ran when we attached.
    parents, older = facts.settings.get("parents"), facts.settings.get("pids")
    if not isinstance(parents, Mapping) or not isinstance(older, Mapping):
        return {}
    mm_of = {int(pid): int(mm) for mm, pid in older.items()}
    out: dict[int, set[int]] = {}
    for mm, pid in older.items():
        above, at = set(), parents.get(str(pid))
        while at is not None and int(at) in mm_of and mm_of[int(at)] not in above:
            above.add(mm_of[int(at)])
            at = parents.get(str(at))
        out[int(mm)] = above - {int(mm)}
    return out
