"""Faults that a handler in user space resolved, and what they brought: by the ioctls of its userfaultfd."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Guarded, Prior, Race
from pagelens.why.facts import Facts
from pagelens.why.history import History
from pagelens.why.lives import UFFD_ASYNC, UFFD_BEFORE, UFFD_MINOR, UFFD_MISSING, UFFD_WP
from pagelens.why.replay import Replayed, state_column

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
Bool = npt.NDArray[np.bool_]

# ioctls that resolve a userfault: COPY, ZEROPAGE, MOVE, WRITEPROTECT, CONTINUE, POISON, WAKE (low 16 bits).
_RESOLVES = {0xAA03, 0xAA04, 0xAA05, 0xAA06, 0xAA07, 0xAA08, 0xAA02}
_COPIES = {0xAA03, 0xAA05}  # COPY, MOVE: destination, source, length
_SPAN_LIMIT = 4096  # pages of one ioctl that are matched one by one
UFFD_SLOW = 4_000  # ns: a handler that sleeps cannot be woken and answer in less


def handled(facts: Facts, run: Replayed, race: I64, present: Bool, guarded: I64) -> tuple[Bool, Bool]:
    """(bool[n], bool[n]): faults that a userfaultfd had to do with, and those that an ioctl answered with a copy. race
    becomes HANDLER where an ioctl resolved that very page.

    An absent page must have waited for a handler; a present one must have been write-protected, and waited
    unless the protection is asynchronous (then the kernel takes it away itself).
    """
    faults = run.faults
    mode = state_column(run.lives, run.state, "uffd", 0)
    if not mode.any():
        return np.zeros(len(faults), bool), np.zeros(len(faults), bool)
    slow = (faults.latency >= UFFD_SLOW) & ~faults.failed
    absent = ~present & ~faults.failed & ((mode & (UFFD_MISSING | UFFD_MINOR)) != 0)
    missing = absent & slow
    protected = present & ((mode & UFFD_WP) != 0) & ((faults.error & 2) != 0) & ~faults.failed
    armed = (guarded == Guarded.UFFD) | ((mode & UFFD_BEFORE) != 0)
    at_once = (mode & (UFFD_ASYNC | UFFD_BEFORE)) != 0
    uffd: Bool = missing | (protected & armed & (slow | at_once))
    # A handler that runs already may answer at once: then its ioctl lies within the fault.
    rows = np.flatnonzero(absent | (protected & slow))
    ioctls = [c for c in facts.calls if c.name == "ioctl" and (c.args[1] & 0xFFFF) in _RESOLVES]
    copied = np.zeros(len(faults), bool)
    if not len(rows) or not ioctls:
        return uffd, copied
    spans = np.array(
        [(c.args[3], c.args[4 + (c.args[1] & 0xFFFF in _COPIES)], c.start, c.end) for c in ioctls], np.int64
    )
    pages = np.minimum(np.maximum(spans[:, 1] >> PAGE_SHIFT, 1), _SPAN_LIMIT)
    at = np.repeat(np.arange(len(pages)), pages)
    step = np.arange(len(at)) - np.repeat(np.cumsum(pages) - pages, pages)
    page = (spans[at, 0] >> PAGE_SHIFT) + step
    order = np.lexsort((spans[at, 2], page))
    page, start, end = page[order], spans[at, 2][order], spans[at, 3][order]
    copies = np.array([(c.args[1] & 0xFFFF) in _COPIES for c in ioctls], bool)[at][order]
    wanted = (faults.addr[rows] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    lo, hi = np.searchsorted(page, wanted, side="left"), np.searchsorted(page, wanted, side="right")
    some = rows[lo < hi]
    spans_of = zip(
        some.tolist(),
        (faults.time[some] - np.maximum(faults.latency[some], 0)).tolist(),
        lo[lo < hi].tolist(),
        hi[lo < hi].tolist(),
        strict=True,
    )
    for row, begun, a, b in spans_of:
        first = a + int(
            np.searchsorted(end[a:b], begun)
        )  # one page's calls end in the order in which they began
        if first < b and start[first] <= faults.time[row] and (slow[row] or start[first] >= begun):
            race[row] = int(Race.HANDLER)
            uffd[row] = True
            copied[row] = copies[first]
    # Where handlers are recorded, an absent page that none has resolved was not theirs: closing the descriptor ends the
    # registration, and close is not recorded.
    uffd[missing & (race != Race.HANDLER) & np.isin(faults.mm, [c.mm for c in ioctls])] = False
    return uffd, copied


def brought_by_copy(run: Replayed, past: History, prior: I64, copied: Bool) -> None:
    """What a handler had copied is a page of one's own, though a read had asked for it. prior: changed in place."""
    rows = np.flatnonzero((past.source >= 0) & (prior == Prior.ZERO))
    rows = rows[copied[past.source[rows]]]
    prior[rows] = int(Prior.ANON)
    rows = rows[past.before[rows] >= 0]
    past.own[rows] = run.faults.time[past.before[rows]]
