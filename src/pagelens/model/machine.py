"""Machine: frames, files and processes of one model, and the settings that all of them share."""

from __future__ import annotations

import numpy as np

from pagelens.model.abi import ANON, FRAME_SHIFT, SHIFT, D, P, W
from pagelens.model.events import EventLog
from pagelens.model.files import File
from pagelens.model.frames import F_ANON, F_DIRTY, F_LAZY, F_SHMEM, F_USED, Frames
from pagelens.model.process import Process
from pagelens.model.profile import Profile, get_profile
from pagelens.model.space import Layout, Limits, Mm
from pagelens.model.zap import zap_range
from pagelens.vm.pages import U64

# include/uapi/linux/kernel-page-flags.h
KPF_UPTODATE, KPF_DIRTY, KPF_BUDDY, KPF_MMAP, KPF_ANON, KPF_SWAPBACKED, KPF_ZERO_PAGE = (
    3,
    4,
    10,
    11,
    12,
    14,
    24,
)


class Machine:
    """A kernel of a profile with its memory.

    memory_pages: frames that exist (overcommit tests against it). page_cache: files known from the start,
    by name. overcommit: vm.overcommit_memory. keep_events: false keeps no event log (pages keep their ids).
    """

    def __init__(
        self,
        profile: str | Profile = "linux-6.18",
        *,
        memory_pages: int = 1 << 30,
        page_cache: dict[str, File] | None = None,
        overcommit: int = 0,
        overcommit_ratio: int = 50,
        max_map_count: int = 65530,
        keep_events: bool = True,
    ) -> None:
        self.profile = get_profile(profile)
        self.memory_pages = memory_pages
        self.frames = Frames()
        self.events = EventLog(keep_events)
        self.files: dict[str, File] = dict(page_cache or {})
        self.overcommit = overcommit
        self.overcommit_ratio = overcommit_ratio
        self.max_map_count = max_map_count
        self.dac_min_addr = (
            0x1_0000  # vm.mmap_min_addr (cap_mmap_addr); hints are raised to 64 KiB in any case
        )
        self.committed = 0
        self.admin_reserve_pages = 2048
        self.user_reserve_pages = 32768
        self.zero_frame = 1
        self.processes: list[Process] = []
        self.foreign: dict[int, int] = {}  # frame -> mappings by processes that are not modelled
        self.parents: dict[int, tuple[int, int] | None] = {}  # mm -> (parent's mm, fork event)
        self._inode = 1024
        self._mm = 0
        self._pid = 1
        self.gup = 0  # faults without event in the system call in progress

    def next_inode(self) -> int:
        self._inode += 1
        return self._inode

    def next_mm(self) -> int:
        self._mm += 1
        return self._mm

    def next_pid(self) -> int:
        self._pid += 1
        return self._pid

    def spawn(
        self, layout: Layout | None = None, limits: Limits | None = None, pid: int | None = None
    ) -> Process:
        """A process as exec leaves it: the areas of the layout."""
        mm = Mm(self, layout or Layout(), limits)
        process = Process(self, mm, pid if pid is not None else self.next_pid())
        process.start()
        return process

    def file(self, name: str, size: int = 0, *, cached: bool = True, shmem: bool = False) -> File:
        """A file on disk (or tmpfs), by name; cached: all of it is in the page cache."""
        found = self.files.get(name)
        if found is None:
            found = self.files[name] = File(self, name, size, shmem=shmem, cached=cached and not shmem)
        return found

    def kernel_file(self, name: str) -> File:
        """The kernel's own pages that a special area ([vdso]) maps in every process."""
        if name not in self.files:
            self.files[name] = File(self, name, 1 << 20)
        return self.files[name]

    def count_fault(self, major: bool, *, gup: bool = False) -> None:
        """mm_account_fault: the counters of the process that runs."""
        process = self.running
        if process is not None:
            if major:
                process.maj_flt += 1
            else:
                process.min_flt += 1
        if gup:
            self.gup += 1

    running: Process | None = None

    def mms(self) -> list[Mm]:
        """All address spaces that live."""
        seen: dict[int, Mm] = {}
        for process in self.processes:
            if process.alive:
                seen[process.mm.number] = process.mm
        return list(seen.values())

    def unmap_file_range(self, file: File, first: int, last: int | None, *, even_cows: bool) -> None:
        """unmap_mapping_range: pages [first, last) of a file leave every address space."""
        for mm in self.mms():
            for area in mm.areas:
                if area.file is not file:
                    continue
                lo = max(first, area.pgoff)
                hi = area.pgoff + area.pages if last is None else min(last, area.pgoff + area.pages)
                if lo < hi:
                    start = area.start + ((lo - area.pgoff) << SHIFT)
                    zap_range(
                        mm, start, start + ((hi - lo) << SHIFT), event=self.events.current, cows=even_cows
                    )

    def page_mkclean(self, file: File, index: int) -> None:
        """folio_mkclean: the page becomes clean and write-protected in every shared mapping."""
        for mm in self.mms():
            for area in mm.areas:
                if area.file is file and area.flags & 8 and area.pgoff <= index < area.pgoff + area.pages:
                    page = (area.start >> SHIFT) + index - area.pgoff
                    pte = mm.tables.get(page)
                    if pte & P and not pte & ANON and pte & (D | W):
                        mm.tables.put(page, pte & ~(D | W), self.events.current)

    def kpagecount(self, pfn: int) -> int:
        """Map count of a frame (kpagecount); 0 for the zero page."""
        return int(self.frames.mapcount[pfn]) if pfn < len(self.frames.mapcount) else 0

    def kpageflags(self, pfn: int) -> int:
        """Flags of a frame as /proc/kpageflags has them; the LRU's own bits are not modelled and stay 0."""
        return int(self.kpage(np.array([pfn], np.uint64))[1][0])

    def kpage(self, pfns: U64) -> tuple[U64, U64]:
        """(kpagecount, kpageflags) of each frame."""
        index = np.minimum(pfns, np.uint64(len(self.frames.flags) - 1)).astype(np.int64)
        flags, mapcount = self.frames.flags[index], self.frames.mapcount[index]
        out = np.full(len(index), 1 << KPF_UPTODATE, np.uint64)
        lazy = (flags & F_LAZY) != 0
        for bit, which in (
            (KPF_MMAP, mapcount != 0),
            (KPF_DIRTY, (flags & F_DIRTY) != 0),
            (KPF_ANON, (flags & F_ANON) != 0),
            (KPF_SWAPBACKED, ((flags & (F_ANON | F_SHMEM)) != 0) & ~lazy),
        ):
            out[which] |= np.uint64(1 << bit)
        out[(flags & F_USED) == 0] = 1 << KPF_BUDDY
        out[pfns == np.uint64(self.zero_frame)] = 1 << KPF_ZERO_PAGE
        return mapcount.astype(np.uint64), out

    def check(self) -> None:
        """Invariants; AssertionError names the first that fails. For tests."""
        count = np.zeros(len(self.frames.mapcount), np.int64)
        for mm in self.mms():
            anon = file = shmem = 0
            last = 0
            for area in mm.areas:
                assert area.start >= last and area.start < area.end, f"{area} overlaps"
                last = area.end
            for chunk in mm.tables.chunks.values():
                pte = chunk.pte[(chunk.pte & np.uint64(1 | 128 | 1024)) == np.uint64(1)]
                np.add.at(count, (pte >> np.uint64(FRAME_SHIFT)).astype(np.int64), 1)
                anon += int(np.count_nonzero(pte & np.uint64(ANON)))
                shmem += int(np.count_nonzero(pte & np.uint64(512)))
                file += int(np.count_nonzero((pte & np.uint64(ANON | 512)) == 0))
            assert (anon, file, shmem) == (mm.rss_anon, mm.rss_file, mm.rss_shmem), (
                "rss differs from present pages"
            )
        for frame, users in self.foreign.items():
            count[frame] += users
        assert (count == self.frames.mapcount).all(), "map counts differ from PTEs"
