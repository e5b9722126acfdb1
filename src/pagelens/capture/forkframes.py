"""The frames of a process that forks, read while it stands at its fork: with those at its end, they tell which pages
were copied since and which were reused.

The thread that forks waits for it, so it is done within a budget: what is not read leaves outcomes open, and is
counted. Rejected: reading at every fork (a program of 400 MB that forks 300 times wrote 150 MB of frames).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pagelens.linux import snapshot as live
from pagelens.linux.procfs import Process
from pagelens.vm.errors import PagelensError
from pagelens.vm.pages import PageRuns

MOST = 1 << 19  # pages of one process: 2 GiB, some 20 ms
MOST_IN_ALL = 4 << 20  # pages of one recording: 32 MiB before compression
FREE_NS = 100_000_000  # that much time is always allowed, and beyond it this part of the time that went by
PART = 50


@dataclass
class ForkFrames:
    """What was read so far. forks: asked for; read: done; both of processes whose frames can be read."""

    began_ns: int = field(default_factory=time.monotonic_ns)
    spent_ns: int = 0
    pages: int = 0
    forks: int = 0
    read: int = 0
    hidden: bool = False

    def take(self, pid: int) -> tuple[int, int, PageRuns] | None:
        """(ns before, ns after, runs with frame numbers) of a process at its fork; None where it is left out."""
        if self.hidden:
            return None
        self.forks += 1
        now = time.monotonic_ns()
        if self.spent_ns > FREE_NS + (now - self.began_ns) // PART or self.pages > MOST_IN_ALL:
            return None
        try:
            with Process.open(pid) as proc:
                found = live.frames_of(proc, MOST)
        except (PagelensError, OSError):
            return None
        finally:
            self.spent_ns += time.monotonic_ns() - now
        if found is None:
            return None
        runs = found[2]
        self.hidden = runs.pfn is None
        if self.hidden:
            return None
        self.pages += runs.pages
        self.read += 1
        return found

    def note(self) -> str:
        """What was left out, for the user; "" where nothing was."""
        left = 0 if self.hidden else self.forks - self.read
        if not left:
            return ""
        return f"{left:,} of {self.forks:,} forks without a look at frames: whether pages were reused or copied is open"
