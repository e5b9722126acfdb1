"""Page frames of the machine, in columns.

A frame is an index; what is known of it stands in growing numpy columns, so that a range of pages is
allocated, shared or freed in one expression. The reference count is not stored: in this model it is the map
count plus one for the page cache, and the rules that ask for it (do_wp_page) ask for exactly that.
Rejected: a class a frame (200 bytes each; a million frames must fit).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

F_USED, F_ANON, F_CACHE, F_DIRTY = 1, 2, 4, 8
F_SHMEM, F_LAZY = 16, 32  # page cache of shmem; lazily freed (MADV_FREE)


class Frames:
    """Columns of all frames. mapcount int32, flags uint8, born int32 (event that filled the frame)."""

    def __init__(self, limit: int | None = None, start: int = 0x1000) -> None:
        self.limit = limit
        self._first = start
        self._next = start
        size = start + 4096
        self.mapcount: I32 = np.zeros(size, np.int32)
        self.flags: U8 = np.zeros(size, np.uint8)
        self.born: I32 = np.zeros(size, np.int32)
        self._free: I64 = np.empty(1024, np.int64)
        self._nfree = 0
        self.used = 0

    def _grow(self, need: int) -> None:
        size = max(need, 2 * len(self.mapcount))
        for name in ("mapcount", "flags", "born"):
            old = getattr(self, name)
            new = np.zeros(size, old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def alloc(self, flags: int, event: int) -> int:
        """One frame with map count 0."""
        self.used += 1
        if self._nfree:
            self._nfree -= 1
            frame = int(self._free[self._nfree])
        else:
            frame = self._next
            self._next += 1
            if frame >= len(self.mapcount):
                self._grow(frame + 1)
        self.flags[frame] = flags | F_USED
        self.mapcount[frame] = 0
        self.born[frame] = event
        return frame

    def alloc_many(self, count: int, flags: int, event: int, mapcount: int = 0) -> I64:
        """int64[count]: frames with that map count, the most recently freed first."""
        self.used += count
        take = min(count, self._nfree)
        fresh = count - take
        frames = self._free[self._nfree - take : self._nfree]
        if fresh:
            new = np.arange(self._next, self._next + fresh, dtype=np.int64)
            frames = np.concatenate((frames, new)) if take else new
        else:
            frames = frames.copy()
        self._nfree -= take
        self._next += fresh
        if self._next > len(self.mapcount):
            self._grow(self._next)
        at = _span(frames)
        self.flags[at] = flags | F_USED
        self.mapcount[at] = mapcount
        self.born[at] = event
        return frames

    def free(self, frame: int) -> None:
        """Give one frame back."""
        self.flags[frame] = 0
        self.used -= 1
        if self._nfree == len(self._free):
            self._free = np.concatenate((self._free, np.empty(len(self._free), np.int64)))
        self._free[self._nfree] = frame
        self._nfree += 1

    def free_many(self, frames: I64) -> None:
        """Give frames back."""
        count = len(frames)
        if not count:
            return
        self.flags[_span(frames)] = 0
        self.used -= count
        need = self._nfree + count
        if need > len(self._free):
            bigger = np.empty(max(need, 2 * len(self._free)), np.int64)
            bigger[: self._nfree] = self._free[: self._nfree]
            self._free = bigger
        self._free[self._nfree : need] = frames
        self._nfree = need

    def unmap(self, frame: int) -> None:
        """One mapping less; an anonymous frame without mapping is freed (page_remove_rmap, put_page)."""
        self.mapcount[frame] -= 1
        if self.mapcount[frame] == 0 and not self.flags[frame] & F_CACHE:
            self.free(frame)

    def unmap_many(self, frames: I64) -> None:
        """One mapping less for each. No frame is named twice: within one area none is mapped twice."""
        if not len(frames):
            return
        at = _span(frames)
        self.mapcount[at] -= 1
        dead = (self.mapcount[at] == 0) & ((self.flags[at] & F_CACHE) == 0)
        if dead.all():
            self.free_many(frames)
        elif dead.any():
            self.free_many(frames[dead])

    def map_many(self, frames: I64) -> None:
        """One mapping more for each; no frame twice."""
        self.mapcount[_span(frames)] += 1

    def lazyfree(self, frames: I64) -> npt.NDArray[np.bool_]:
        """bool[n]: frames that MADV_FREE marked (swap-backed bit cleared)."""
        lazy: npt.NDArray[np.bool_] = (self.flags[frames] & F_LAZY) != 0
        return lazy

    def refcount(self, frame: int) -> int:
        """Mappings, plus one for the page cache."""
        return int(self.mapcount[frame]) + (1 if self.flags[frame] & F_CACHE else 0)

    def in_use(self) -> I64:
        """int64[n]: the frames that are allocated."""
        return np.flatnonzero(self.flags & F_USED)


def _span(frames: I64) -> slice | I64:
    # Frames that were allocated together are consecutive, and a slice is several times faster than an index.
    if (
        len(frames) > 1
        and frames[-1] - frames[0] == len(frames) - 1
        and (frames[1:] - frames[:-1] == 1).all()
    ):
        return slice(int(frames[0]), int(frames[-1]) + 1)
    return frames
