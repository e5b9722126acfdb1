"""What pagescan has registered with its userfaultfd, and what it could not.

A span may hold several vmas, and any of them may be gone, replaced or taken by the program's own userfaultfd by
the time of the call; the kernel then refuses the whole span. So a refused span is tried vma by vma, and what is
refused still is left out, with its size and errno for the epoch's notes.
Rejected: asking for each vma alone from the start (a JVM has thousands).
"""

from __future__ import annotations

import contextlib
import errno

from pagelens.dirty import spans
from pagelens.dirty.layout import Layout
from pagelens.dirty.spans import Spans
from pagelens.linux import maps
from pagelens.linux.procfs import Process
from pagelens.linux.userfault import Mode, Userfault
from pagelens.vm.errors import TargetGoneError


class Registration:
    """Registers parts of `layout` with `uffd`. failed: bytes refused by errno; foreign: the spans refused."""

    def __init__(self, proc: Process, uffd: Userfault, layout: Layout) -> None:
        self._proc = proc
        self._uffd = uffd
        self._layout = layout
        self.failed: dict[int, int] = {}
        self.foreign = spans.EMPTY

    def forget(self) -> None:
        """Nothing is refused so far: the maps have changed."""
        self.failed, self.foreign = {}, spans.EMPTY

    def register(self, where: Spans) -> None:
        """Register `where` for write protection; what cannot be is given up, and counted."""
        for start, end in where.pairs():
            try:
                self._uffd.register(start, end, Mode.WP)
            except OSError as exc:
                self._one_by_one(start, end, exc)

    def _one_by_one(self, start: int, end: int, exc: OSError) -> None:
        self._gone(exc)
        for vma in self._layout.vmas.overlapping(start, end):
            first, last = max(start, vma.start), min(end, vma.end)
            try:
                self._uffd.register(first, last, Mode.WP)
            except OSError as error:
                self._gone(error)
                if error.errno == errno.EINVAL and vma not in maps.read(self._proc):
                    continue  # unmapped meanwhile
                number = error.errno or errno.EIO
                self.failed[number] = self.failed.get(number, 0) + last - first
                self._give_up(spans.of([(first, last)]))

    def _give_up(self, where: Spans) -> None:
        self.foreign = spans.union(self.foreign, where)
        self._layout.leave_out(where)

    def _gone(self, exc: OSError) -> None:
        if exc.errno == errno.ESRCH or not self._uffd.mm_alive():
            raise TargetGoneError(f"the address space of process {self._proc.pid} is gone") from None

    def mark_shared(self, where: Spans) -> None:
        """Put markers into all entries of shared mappings, but for large ones."""
        for start, end in spans.minus(where, self._layout.large).pairs():
            try:
                self._uffd.writeprotect(start, end, protect=True)
            except OSError as exc:
                self._gone(exc)
                if exc.errno != errno.ENOENT:
                    raise
                # Unmapped meanwhile (the next look sees it), or mapped anew at the same place: not ours yet.
                with contextlib.suppress(OSError):
                    self._uffd.register(start, end, Mode.WP)
                    self._uffd.writeprotect(start, end, protect=True)
