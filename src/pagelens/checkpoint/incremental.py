"""A chain of checkpoints of one process: one every S seconds, the newest N kept.

    DIR/000000   full
    DIR/000001   what differs from 000000, …

Written pages are known by watching the process (`tracked`) where the kernel can, else contents are compared.
With N kept, a full checkpoint is made every N-th time, so that old ones can be deleted whole once none that
is kept needs them: at most 2N-1 directories lie on disk. Rejected: merging the oldest into the next each
time (writes all contents again for every increment).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from pagelens.checkpoint.dump import Result, dump
from pagelens.checkpoint.files import Files
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.tracked import CannotTellError, Watched
from pagelens.vm.errors import CapabilityMissingError, UsageError


class Chain:
    """Makes a chain in directory `out` (created; must be empty). Context manager."""

    def __init__(
        self, pid: int, out: Path, *, keep: int = 0, level: int = 1, with_files: bool = False
    ) -> None:
        self.pid, self.out, self.keep, self.level, self.with_files = pid, out, keep, level, with_files
        self.made: list[Path] = []
        self.notes: list[str] = []
        self._number = 0
        self._watched: Watched | None = None

    def __enter__(self) -> Chain:
        if self.out.exists() and any(self.out.iterdir()):
            raise UsageError(f"{self.out} is not empty; a chain needs a directory of its own")
        self.out.mkdir(exist_ok=True)
        try:
            self._watched = Watched(self.pid)
        except CapabilityMissingError as error:
            self.notes.append(f"contents are compared each time, because writes cannot be watched: {error}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watched is not None:
            self._watched.close()

    def run(self, every: float, count: int = 0) -> Iterator[Result]:
        """One checkpoint every `every` seconds, `count` of them (0: until the target is gone or we are
        stopped). Raises as `dump`."""
        due = time.monotonic()
        while not count or self._number < count:
            yield self.take()
            if count and self._number >= count:
                return
            due = max(due + every, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def take(self) -> Result:
        """The next checkpoint of the chain, now."""
        full = not self.made or (self.keep and self._number % self.keep == 0)
        path = self.out / f"{self._number:06d}"
        done = self._dump(path, None if full else self.made[-1])
        self._number += 1
        self.made.append(path)
        if self.keep:
            self._forget()
        return done

    def _dump(self, path: Path, parent: Path | None) -> Result:
        if self._watched is not None:
            try:
                return self._watched.take(path, parent, level=self.level, with_files=self.with_files)
            except CannotTellError as error:
                self.notes.append(f"{path.name}: contents were compared: {error}")
        return dump(self.pid, path, parent=parent, level=self.level, with_files=self.with_files)

    def _forget(self) -> None:
        # Delete what is neither among the newest `keep` nor needed by one of them. Newest first: if we are killed
        # meanwhile, none is left without what it needs.
        kept = self.made[-self.keep :]
        needed = {path.name for path in kept}
        for path in kept:
            for entry in Stored.open(path).manifest["origins"]:
                needed.add(Path(entry["path"]).name)
        for path in reversed(self.made.copy()):
            if path.name not in needed:
                Files().discard(path)
                self.made.remove(path)
