"""Frame columns: /proc/kpagecount and /proc/kpageflags by frame number (needs CAP_SYS_ADMIN).

Frame numbers are sorted, made unique and read by runs, so that a fragmented process costs one pread per run
of frames and a THP one for its 512 pages. Sources: fs/proc/page.c (kpagecount_read, kpageflags_read).
With CONFIG_NO_PAGE_MAPCOUNT (6.15 and later) kpagecount gives the average of a large folio, rounded up from
0.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.pages import I64, U64, PageRuns

_GAP = 32  # frames: reading a few frames too many is cheaper than another pread


def lookup(name: str, pfn: U64) -> tuple[U64, npt.NDArray[np.bool_]]:
    """(uint64 values, bool known) of /proc/`name` (kpagecount, kpageflags, kpagecgroup) for each frame.

    Frame 0 stands for unknown. A frame outside of memory (device memory) is not known.
    Raises CapabilityMissingError where the file cannot be read.
    """
    unique, back = np.unique(pfn, return_inverse=True)
    values = np.zeros(len(unique), dtype=np.uint64)
    known = np.zeros(len(unique), dtype=np.bool_)
    try:
        fd = os.open(f"/proc/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise CapabilityMissingError(
            f"cannot read /proc/{name}: {exc.strerror}", capability=name, fix="run pagelens as root (sudo)"
        ) from None
    try:
        far = np.flatnonzero(np.diff(unique) > np.uint64(_GAP)) + 1
        first = np.concatenate(([0], far)) if len(unique) else np.empty(0, np.int64)
        last = np.concatenate((far, [len(unique)])) - 1 if len(unique) else first
        for i, j in zip(first.tolist(), last.tolist(), strict=True):
            if not unique[j]:
                continue
            base = int(unique[i])
            data = os.pread(fd, (int(unique[j]) - base + 1) * 8, base * 8)
            column = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.uint64)
            index = (unique[i : j + 1] - unique[i]).astype(np.int64)
            here = index < len(column)
            values[i : j + 1][here] = column[index[here]]
            known[i : j + 1] = here
        if len(unique) and not unique[0]:
            known[0], values[0] = False, 0
    except OSError as exc:
        raise CapabilityMissingError(
            f"cannot read /proc/{name}: {exc.strerror}", capability=name, fix="run pagelens as root (sudo)"
        ) from None
    finally:
        os.close(fd)
    return values[back], known[back]


def annotate(runs: PageRuns) -> PageRuns:
    """The same runs with mapcount (int64, -1 unknown) and kflags (uint64, 0 unknown). Needs `runs.pfn`."""
    if runs.pfn is None:
        raise ValueError("runs without frame numbers")
    count, known = lookup("kpagecount", runs.pfn)
    mapcount: I64 = np.where(known, count.astype(np.int64), np.int64(-1))
    kflags, known = lookup("kpageflags", runs.pfn)
    return PageRuns(runs.start, runs.count, runs.state, runs.pfn, mapcount, np.where(known, kflags, 0))
