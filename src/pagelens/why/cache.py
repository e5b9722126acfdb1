"""What the page cache is known to have held: whether a read could map the pages around its own.

Known are faults, whoever took them, calls that populate, what pwrite put there, and what snapshots found. What leaves
again: by a cut or a hole, which is certain; by MADV_PAGEOUT, perhaps. read(2), write(2) and readahead are not recorded,
so of a file with a name no page is ever known to be absent. Nobody else can reach shared memory without one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT
from pagelens.why.evidence import Area
from pagelens.why.facts import Facts
from pagelens.why.files import NAMELESS, device
from pagelens.why.replay import Replayed

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed
_WRITES = ("pwrite64", "pwritev", "pwritev2")
_GONE, _PERHAPS, _THERE = 0, 1, 2


class Cache:
    """The page cache, as far as recorded."""

    def __init__(self, facts: Facts, run: Replayed) -> None:
        self._run = run
        spans = [(f, a, b, t, _THERE if there else _PERHAPS) for f, a, b, t, there in run.lives.cached]
        spans += [(*found, _THERE) for found in facts.cached]
        for part, time, _ in run.removed_parts:
            spans.append((part.file, part.start >> PAGE_SHIFT, part.end >> PAGE_SHIFT, time, _GONE))
        for call in facts.calls:
            if call.name in _WRITES and call.result > 0 and call.inode:
                start, end = call.args[3], call.args[3] + call.result - 1
                file = (device(call.dev), call.inode)
                spans.append((file, start >> PAGE_SHIFT, (end >> PAGE_SHIFT) + 1, call.end, _THERE))
        self._spans: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {}
        for file, *span in spans:
            self._spans.setdefault(file, []).append((span[0], span[1], span[2], span[3]))
        self._columns: dict[tuple[str, int], tuple[I64, I64, I64]] = {}
        self._pages: dict[tuple[tuple[str, int], int], tuple[list[int], list[int]]] = {}

    def held(self, file: tuple[str, int], page: int, when: int) -> bool | None:
        """Whether page number `page` of `file` was in the cache at `when` (ns); None: perhaps."""
        times, codes = self._story(file, page)
        at = int(np.searchsorted(times, when)) - 1
        if at >= 0 and codes[at] == _THERE:
            return True
        # Nobody could have brought it back unseen.
        never = at < 0 or codes[at] == _GONE
        return False if never and file[0] == NAMELESS else None

    def _story(self, file: tuple[str, int], page: int) -> tuple[list[int], list[int]]:
        if (file, page) not in self._pages:
            spans, where, time = self._of(file)
            mine = spans[(spans[:, 0] <= page) & (page < spans[:, 1])]
            low, high = np.searchsorted(where, [page, page + 1])
            events = [(int(t), int(code)) for t, code in mine[:, 2:].tolist()]
            events += [(int(t), _THERE) for t in time[low:high].tolist()]
            events.sort()
            self._pages[file, page] = ([t for t, _ in events], [code for _, code in events])
        return self._pages[file, page]

    def _of(self, file: tuple[str, int]) -> tuple[I64, I64, I64]:
        # Spans; page and ns of the faults that had a page of the file before them.
        if file not in self._columns:
            run, states = self._run, self._run.lives.states
            mine = np.array([s.file == file for s in states] + [False], bool)
            shift = np.array([s.shift for s in states] + [0], np.int64)
            private = np.array([s.area is Area.FILE for s in states] + [False], bool)
            rows = np.flatnonzero(mine[run.state] & ~run.faults.failed)
            # A write to a present page of a private mapping may be to a copy that is nobody's file any more.
            rows = rows[~(private[run.state[rows]] & ((run.faults.error[rows] & 1) != 0))]
            where = (run.faults.addr[rows].astype(np.int64) + shift[run.state[rows]]) >> PAGE_SHIFT
            order = np.lexsort((run.faults.time[rows], where))
            spans = np.array(self._spans.get(file, []), np.int64).reshape(-1, 4)
            self._columns[file] = (spans, where[order], run.faults.time[rows][order])
        return self._columns[file]
