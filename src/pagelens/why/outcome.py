"""Outcome: whether a write after a fork copied its page or reused it, by the frame numbers of two snapshots.

The kernel reuses a page that nobody else maps unless somebody still holds a reference (wp_can_reuse_anon_folio). With
BPF the fault itself tells (`new_pages`: whether a page was taken for it). Where it does not (perf, captures of old),
frames are read at each fork, and in the snapshots at the end: some show the page before the write (in its writer, or in
a relative that still had the same), others after it. Equal: reused. Different: copied.

A frame is known for a page while nobody has written, dropped or populated it between: `sharing` counts those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.pages import U32, PageRuns, PageState
from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Outcome
from pagelens.why.facts import Facts
from pagelens.why.lives import Seg
from pagelens.why.replay import Replayed
from pagelens.why.sharing import Kin

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
_MOST = 512  # snapshots that are asked for one address space, the nearest


def outcomes(facts: Facts, run: Replayed, kin: Kin, rows: I64, when: I64) -> I64:
    """Outcome of each fault in `rows`. when: ns of each, as it stands to forks."""
    out = np.full(len(rows), int(Outcome.UNDECIDED), np.int64)
    frames = _Frames(facts, run)
    if not len(rows) or not frames.known:
        return out
    mms = run.faults.mm[rows]
    for mm in np.unique(mms).tolist():
        mine = np.flatnonzero(mms == mm)
        key, time = run.key[rows[mine]], when[mine]
        before = _look(frames, kin, mm, key, time, earlier=True)
        asked = np.flatnonzero(before)
        after = np.zeros(len(mine), np.int64)
        after[asked] = _look(frames, kin, mm, key[asked], time[asked], earlier=False)
        both = (before > 0) & (after > 0)
        decided = np.where(before == after, int(Outcome.REUSED), int(Outcome.COPIED))
        out[mine[both]] = decided[both]
    return out


def _look(frames: _Frames, kin: Kin, mm: int, key: I64, time: I64, *, earlier: bool) -> I64:
    # The frame of each page just before (or after) `time`, 0 where no snapshot says.
    out = np.zeros(len(key), np.int64)
    if not len(time):
        return out
    shots = [s for other in kin.relatives(mm) for s in frames.of(other)]
    shots = [s for s in shots if (s.until < time.max() if earlier else s.start > time.min())]
    shots.sort(key=lambda s: s.until if earlier else -s.start, reverse=True)
    for shot in shots[:_MOST]:
        left = np.flatnonzero((out == 0) & ((time > shot.until) if earlier else (time < shot.start)))
        if not len(left):
            continue
        # While a snapshot is read, other threads may write: what counts is that none has, from its begin to its end.
        at = shot.start if earlier and shot.mm == mm else shot.until
        same, theirs = kin.same_page(mm, shot.mm, key[left], time[left], at)
        keys, pfn = frames.columns(shot)
        if not len(keys):
            continue
        here = np.minimum(np.searchsorted(keys, theirs), len(keys) - 1)
        hit = same & (keys[here] == theirs)
        out[left[hit]] = pfn[here[hit]]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Shot:
    # pages: with frames. segs: what was mapped. start, until: ns.
    mm: int
    start: int
    until: int
    pages: PageRuns
    segs: Sequence[Seg]


class _Frames:
    # All that shows frames of anonymous pages: first and last snapshots, and those of forks.
    def __init__(self, facts: Facts, run: Replayed) -> None:
        self._of: dict[int, list[_Shot]] = {}
        self._read: dict[int, tuple[I64, I64]] = {}
        for mm, snap in facts.first.items():
            if mm in run.first_keys:
                self._add(mm, snap.time_ns, snap.known_ns, snap.pages, run.first_keys[mm][1])
        for mm, snap in facts.last.items():
            if mm in run.spaces:
                self._add(mm, snap.time_ns, max(snap.until_ns, snap.time_ns), snap.pages, run.spaces[mm].segs)
        for shot, segs in zip(facts.frames, run.frame_segs, strict=True):
            self._add(shot.mm, shot.start, shot.until, shot.pages, segs)

    def _add(self, mm: int, start: int, until: int, pages: PageRuns | None, segs: Sequence[Seg]) -> None:
        if pages is not None and pages.pfn is not None:
            self._of.setdefault(mm, []).append(_Shot(mm, start, until, pages, segs))

    @property
    def known(self) -> bool:
        """Whether any frame is known."""
        return bool(self._of)

    def of(self, mm: int) -> list[_Shot]:
        """All of one address space."""
        return self._of.get(mm, [])

    def columns(self, shot: _Shot) -> tuple[I64, I64]:
        """(keys, frames), ascending by key."""
        found = self._read.get(id(shot))
        if found is None:
            found = self._read[id(shot)] = page_columns(shot.pages, shot.segs)[:2]
        return found


def page_columns(pages: PageRuns, segs: Sequence[Seg]) -> tuple[I64, I64, U32]:
    """(keys, frames, states) of the anonymous pages whose frames are known, ascending by key. segs: what was mapped."""
    assert pages.pfn is not None
    addr, pfn, state = pages.addresses().astype(np.int64), pages.pfn.astype(np.int64), pages.states()
    start, end, base = (np.array([getattr(s, n) for s in segs], np.int64) for n in ("start", "end", "key"))
    if not len(start):
        return start, start, state[:0]
    at = np.maximum(np.searchsorted(start, addr, side="right") - 1, 0)
    kept = (pfn > 0) & (addr >= start[at]) & (addr < end[at])
    kept &= (state & np.uint32(PageState.FILE | PageState.ZERO)) == 0
    key = (base[at] + ((addr - start[at]) >> PAGE_SHIFT))[kept]
    order = np.argsort(key)
    return key[order], pfn[kept][order], state[kept][order]
