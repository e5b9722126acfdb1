"""Files as paging sees them: a size, and a page cache of frames.

Contents are not modelled, only which page is cached, dirty or mapped. Residency is handed in by the caller:
the model never guesses what a disk would have read ahead, beyond the page that a fault asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagelens.model.abi import EINVAL, PAGE, SHIFT
from pagelens.model.frames import F_CACHE, F_DIRTY, F_SHMEM, I64

if TYPE_CHECKING:
    from pagelens.model.machine import Machine

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


class File:
    """An open file and its inode. shmem: memfd, tmpfs, shared anonymous memory.

    writable, readable: how it was opened (FMODE_WRITE, FMODE_READ). size in bytes.
    page_mkwrite: the file system wants to know of the first write of each page (ext4 does, shmem not).
    """

    __slots__ = (
        "charged",
        "close_hook",
        "dev",
        "frame_flags",
        "inode",
        "machine",
        "map_pages",
        "name",
        "noexec",
        "not_uptodate",
        "opens",
        "page_mkwrite",
        "pages",
        "readable",
        "shmem",
        "size",
        "thp_align",
        "users",
        "writable",
    )  # fmt: skip

    def __init__(
        self,
        machine: Machine,
        name: str,
        size: int = 0,
        *,
        shmem: bool = False,
        writable: bool = True,
        readable: bool = True,
        dev: str = "00:01",
        inode: int = 0,
        cached: bool = False,
    ) -> None:
        self.machine = machine
        self.name = name
        self.size = size
        self.shmem = shmem
        self.writable = writable
        self.readable = readable
        self.noexec = False
        self.frame_flags = F_CACHE | (F_SHMEM if shmem else 0)
        self.dev = dev
        self.inode = inode or machine.next_inode()
        self.page_mkwrite = not shmem
        self.thp_align = False  # get_unmapped_area = thp_get_unmapped_area (ext4, xfs, btrfs)
        self.close_hook = False  # vm_ops->close; of what is modelled only System V segments have it
        self.map_pages = True  # vm_ops->map_pages: fault-around
        self.users = 0  # areas that map it
        self.opens = 1  # open descriptors; shared anonymous memory has none
        self.charged = 0  # pages charged at once (shmem_acct_size), given back with the object
        self.pages: dict[int, int] = {}  # page index -> frame
        # shmem_fallocate leaves its pages !uptodate until someone asks for them: fault-around passes them by.
        self.not_uptodate: set[int] = set()
        if cached:
            self.make_resident(0, (size + PAGE - 1) >> SHIFT)

    def close(self) -> None:
        """Close the descriptor: shmem without name, descriptor and mapping is freed."""
        self.opens = 0
        self.unused()

    def unused(self) -> None:
        """Free an object that nobody can reach any more; a file on disk stays."""
        if self.shmem and not self.opens and not self.users:
            self._drop(0, None)
            self.machine.committed -= self.charged
            self.charged = 0

    @property
    def n_pages(self) -> int:
        """Pages that the size covers."""
        return (self.size + PAGE - 1) >> SHIFT

    def make_resident(self, first: int, count: int) -> None:
        """Put pages into the page cache (read ahead, or pre-read by the caller)."""
        missing = [i for i in range(first, first + count) if i not in self.pages]
        frames = self.machine.frames.alloc_many(len(missing), self.frame_flags, self.machine.events.current)
        self.pages.update(zip(missing, frames.tolist(), strict=True))

    def lookup(self, index: int) -> int:
        """The frame of a cached page, or -1."""
        return self.pages.get(index, -1)

    def lookup_many(self, first: int, count: int) -> I64:
        """int64[count]: frames, -1 where not cached."""
        get = self.pages.get
        return np.fromiter((get(i, -1) for i in range(first, first + count)), np.int64, count)

    def get_page(self, index: int, *, write: bool = False) -> tuple[int, bool]:
        """(frame, major) of the page at index, brought in if need be. shmem allocates zeros: minor."""
        frame = self.pages.get(index, -1)
        self.not_uptodate.discard(index)
        major = False
        if frame < 0:
            frame = self.machine.frames.alloc(self.frame_flags, self.machine.events.current)
            self.pages[index] = frame
            major = not self.shmem
        if write:
            self.machine.frames.flags[frame] |= F_DIRTY
        return frame, major

    def ftruncate(self, size: int) -> int:
        """Change the size; pages beyond it leave the cache and every address space that maps them."""
        if size < 0:
            return EINVAL
        old, self.size = self.size, size
        if size <= old:  # shmem_setattr: also where nothing shrinks, what fallocate kept beyond the end goes
            self.machine.unmap_file_range(self, (size + PAGE - 1) >> SHIFT, None, even_cows=True)
            self._drop((size + PAGE - 1) >> SHIFT, None)
        return 0

    def fallocate(self, mode: int, offset: int, length: int) -> int:
        """Allocate, or punch a hole (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""
        if offset < 0 or length <= 0:
            return EINVAL
        end = offset + length
        if mode & FALLOC_FL_PUNCH_HOLE:
            first, last = (offset + PAGE - 1) >> SHIFT, end >> SHIFT
            if first < last:
                self.machine.unmap_file_range(self, first, last, even_cows=False)
                self._drop(first, last)
            return 0
        if self.shmem:
            wanted = range(offset >> SHIFT, (end + PAGE - 1) >> SHIFT)
            self.not_uptodate.difference_update(wanted)  # those that were there are cleared now
            self.not_uptodate.update(i for i in wanted if i not in self.pages)
        self.make_resident(offset >> SHIFT, ((end + PAGE - 1) >> SHIFT) - (offset >> SHIFT))
        for index in range(offset >> SHIFT, (end + PAGE - 1) >> SHIFT):
            self.machine.frames.flags[self.pages[index]] |= F_DIRTY
        if not mode & FALLOC_FL_KEEP_SIZE:
            self.size = max(self.size, end)
        return 0

    def pwrite(self, length: int, offset: int) -> int:
        """Write: pages come into the cache dirty, the size grows. Returns the length."""
        if offset < 0 or length < 0:
            return EINVAL
        for index in range(offset >> SHIFT, (offset + length + PAGE - 1) >> SHIFT):
            self.get_page(index, write=True)
        self.size = max(self.size, offset + length)
        return length

    def writeback(self, first: int, last: int) -> None:
        """Write dirty pages of [first, last) back: they become clean, and write-protected where mapped."""
        if self.shmem:
            return
        frames = self.machine.frames
        dirty = [i for i, f in self.pages.items() if first <= i < last and frames.flags[f] & F_DIRTY]
        for index in dirty:
            self.machine.page_mkclean(self, index)
            frames.flags[self.pages[index]] &= ~np.uint8(F_DIRTY)

    def _drop(self, first: int, last: int | None) -> None:
        gone = [i for i in self.pages if i >= first and (last is None or i < last)]
        for index in gone:
            self.drop_page(index)

    def drop_page(self, index: int) -> None:
        """A page leaves the cache (truncation, reclaim); freed unless an address space still maps it."""
        frame = self.pages.pop(index)
        self.not_uptodate.discard(index)
        frames = self.machine.frames
        frames.flags[frame] &= ~np.uint8(F_CACHE)
        if frames.mapcount[frame] == 0:
            frames.free(frame)
