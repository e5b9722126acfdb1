"""Backend `soft-dirty`: clear_refs 4, then bit 55 of pagemap (Documentation/admin-guide/mm/soft-dirty.rst).

Needs a kernel with CONFIG_MEM_SOFT_DIRTY, found by a write (a kernel without it accepts the clear and shows
clean pages for ever). Reading and clearing are two steps for the kernel, so the target is held still between
them (`linux.hold`); its own process cannot be, and there a write by another thread in between is lost.

False dirt: a mapping that is born, grows, merges or moves is marked whole by a flag of the vma (VM_SOFTDIRTY),
written or not; smaps shows the flag ("sd"), so such pages are listed as VMA_FLAG, apart from written ones.
What the bit does not show: contents that went away. MADV_DONTNEED and a read after it leave a clean page of
zeros (KERNEL_FACTS), so what was populated before and is not now is listed as DISCARDED; a zero page counts as
unpopulated, which needs PAGEMAP_SCAN or frame numbers (CAP_SYS_ADMIN) to see.
Rejected: reading the bit without holding the target (loses writes, as the oracle shows).
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from typing import NamedTuple

import numpy as np

from pagelens.dirty import moved, spans
from pagelens.dirty.epoch import Builder, Look, Semantics, Why
from pagelens.dirty.layout import ANON, FILE, SHARED, Layout
from pagelens.dirty.spans import U64, Spans
from pagelens.linux import frames, pagemap, pagescan, smaps
from pagelens.linux.hold import Held
from pagelens.linux.pagescan import Category
from pagelens.linux.procfs import Process
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from pagelens.vm.pages import PageState
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE, format_size

_WANTED = (
    Category.PRESENT
    | Category.SWAPPED
    | Category.FILE
    | Category.PFNZERO
    | Category.HUGE
    | Category.SOFT_DIRTY
)
_POPULATED = Category.PRESENT | Category.SWAPPED


class _Pages(NamedTuple):
    start: U64
    end: U64
    categories: U64

    def having(self, bits: Category, without: Category = Category.NONE) -> Spans:
        hit = (self.categories & np.uint64(bits)) == np.uint64(bits)
        hit &= (self.categories & np.uint64(without)) == 0
        return spans.joined(self.start[hit], self.end[hit])


class SoftDirty:
    """Watches a process by its soft-dirty bits. The clear acts on the whole process: other users of the bits
    (CRIU) and this backend disturb each other. hold: stop the target between reading and clearing."""

    semantics = Semantics(
        name="soft-dirty",
        scope="any process",
        needs="CONFIG_MEM_SOFT_DIRTY (probed); ptrace rights; nobody else using soft-dirty on the process",
        extra=(Why.VMA_FLAG, Why.HUGE, Why.NEW, Why.DISCARDED, Why.DROPPED, Why.MOVED),
        too_much="a mapping whole at birth, growth, merge or move (VMA_FLAG); 512 pages for a byte of a huge page, "
        "and all pages of a large folio that a write fault maps; pages that the kernel moved to another frame",
        misses="writes through another mapping of the same memory; shared pages written and dropped by the "
        "kernel between two looks; without PAGEMAP_SCAN and CAP_SYS_ADMIN, contents discarded and read again",
        cost="one fault at the first write to a page; each look reads 8 bytes a populated page and stops the "
        "target meanwhile",
    )

    def __init__(self, proc: Process, *, ranges: Spans | None = None, hold: bool = True) -> None:
        self._proc = proc
        self._hold = hold and proc.pid != os.getpid()
        self._layout = Layout(proc, ranges, 1 << 62)
        self._scans = Category.SOFT_DIRTY in pagescan.supported()
        self._zero_pfn = 0 if self._scans else _zero_frame()
        self._fd = -1
        self._watched = spans.EMPTY
        self._content = spans.EMPTY
        self._shared = spans.EMPTY
        self._frames = self._frames_before = moved.NONE
        self._mergeable = spans.EMPTY
        self._left_out = spans.EMPTY

    def arm(self) -> None:
        """Clear the bits; everything written from here on is dirt."""
        self._fd = self._proc.fd("pagemap")
        self._layout.read(self._watched)
        self._remember(self._read())
        self._clear()
        self._watched = self._layout.watched

    def forget(self) -> None:
        """The next look lists all contents, as NEW."""
        self._watched = spans.EMPTY

    def contents(self) -> Spans:
        """Pages with private contents as of the last look."""
        return self._content

    def look(self) -> Look:
        """Read, clear, and tell false dirt from writes."""
        still = Held(self._proc.pid) if self._hold else contextlib.nullcontext()
        with still:
            pages, flagged = self.read_step()
            self.clear_step()
        return self.judge(pages, flagged)

    # The three steps of a look, apart: `compare` runs those of several backends while it holds the target.

    def read_step(self) -> tuple[_Pages, Spans]:
        """Maps, bits, and the vmas that carry the flag."""
        if self._layout.read(self._watched):
            self._left_out = spans.EMPTY
        text = self._proc.read("smaps")
        flagged = spans.of(smaps.flagged(text, b"sd"))
        self._mergeable = spans.of(smaps.flagged(text, b"mg"))
        pages = self._read()
        if not text or not self._proc.alive:
            raise TargetGoneError(f"the address space of process {self._proc.pid} is gone")
        return pages, flagged

    def clear_step(self) -> None:
        """Begin the next epoch."""
        self._clear()

    def judge(self, pages: _Pages, flagged: Spans) -> Look:
        """The look's answer."""
        kinds = self._layout.kinds
        builder = Builder()
        look = Look(builder, self._layout.vmas)
        fresh = spans.minus(self._layout.watched, self._watched)
        marked = spans.union(
            spans.common(pages.having(Category.SOFT_DIRTY, Category.PFNZERO), kinds[ANON]),
            spans.common(pages.having(Category.SOFT_DIRTY, Category.PFNZERO | Category.FILE), kinds[FILE]),
        )
        shared = spans.common(pages.having(Category.SOFT_DIRTY), kinds[SHARED])
        marked = spans.union(marked, shared)
        before_content, before_shared = self._content, self._shared
        self._remember(pages)
        builder.add(spans.common(spans.union(self._content, self._shared), fresh), Why.NEW)
        builder.add(spans.common(marked, flagged), Why.VMA_FLAG)
        huge = spans.common(marked, pages.having(Category.HUGE))
        builder.add(huge, Why.HUGE)
        rest = spans.minus(marked, builder.seen)
        try:
            if rest:
                builder.add(self._of_large_folios(rest), Why.HUGE)
                rest = spans.minus(rest, builder.seen)
            places = (self._frames_before, self._frames)
            builder.add(moved.moved(*places, rest, self._content, self._mergeable), Why.MOVED)
        except CapabilityMissingError:
            look.notes.append(
                "frames are hidden: pages that were marked with their large folio, or moved by the kernel, "
                "count as written"
            )
        builder.add(marked, Why.WRITTEN)
        gone = spans.minus(before_content, self._content)
        mapped = Spans(look.vmas.starts, look.vmas.ends)
        builder.add(spans.common(self._layout.take_replaced(), mapped), Why.DISCARDED)
        still = spans.common(gone, mapped)
        builder.add(still, Why.DISCARDED)
        builder.add(spans.common(spans.minus(before_shared, self._shared), mapped), Why.DROPPED)
        look.unmapped_pages = gone.pages - still.pages
        look.details["content_pages"] = self._content.pages
        look.details["false_dirt"] = spans.common(marked, flagged).pages
        if self._left_out:
            size = format_size(self._left_out.pages << PAGE_SHIFT)
            look.notes.append(f"the longest mappings, {size} in all, are not watched (no PAGEMAP_SCAN)")
            look.complete = False
        if not self._hold:
            look.notes.append("not held still: a write between reading and clearing is lost")
            look.complete = False
        if not self._scans and not self._zero_pfn:
            look.notes.append("zero pages cannot be told: discarded contents that were read again look clean")
            look.complete = False
        self._watched = self._layout.watched
        return look

    def _of_large_folios(self, marked: Spans) -> Spans:
        # A write fault maps as many pages of a large folio as fit, all of them writable and dirty (finish_fault
        # and set_pte_range in mm/memory.c: shared memory; in 7.2 files too, for ext4 has such folios;
        # do_anonymous_page: multi-size huge pages), and a huge page that was written and then split leaves the
        # bit in all of its entries. Whether the page was mapped at the look before does not tell: it may have
        # been dropped and mapped again since.
        page = frames.having(self._fd, marked.start, marked.end, frames.COMPOUND)
        return spans.joined(page, page + np.uint64(PAGE_SIZE))

    def close(self) -> None:
        """Nothing to undo: the bits stay as they are."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _remember(self, pages: _Pages) -> None:
        kinds = self._layout.kinds
        anon = spans.common(_any(pages, Category.PFNZERO), kinds[ANON])
        own = spans.common(_any(pages, Category.PFNZERO | Category.FILE), kinds[FILE])
        self._content = spans.union(anon, own)
        self._shared = spans.common(_any(pages, Category.NONE), kinds[SHARED])

    def _clear(self) -> None:
        fd = self._proc.fd("clear_refs", os.O_WRONLY)
        try:
            os.write(fd, b"4")
        finally:
            os.close(fd)

    def _read(self) -> _Pages:
        # Frames are read with the bits, while the target is held and before the clear: what the kernel moves later
        # is marked in the next epoch.
        where = self._layout.watched
        self._frames_before = self._frames
        if not self._scans and where.pages > pagemap.MOST:
            # Without PAGEMAP_SCAN 8 bytes are written for each mapped page, while the target is held: the 18 TiB
            # that AddressSanitizer reserves would take minutes. The longest are left out.
            length = where.end - where.start
            order = np.argsort(length, kind="stable")
            kept = np.sort(order[np.cumsum(length[order]) <= np.uint64(pagemap.MOST << PAGE_SHIFT)])
            part = Spans(where.start[kept], where.end[kept])
            self._left_out = spans.minus(where, part)
            self._layout.leave_out(self._left_out)
            where = part
        if self._scans:
            found = pagescan.scan(self._fd, where.pairs(), anyof=_POPULATED, ret=_WANTED)
            pages = _Pages(found.start, found.end, found.categories)
            populated = spans.common(_any(pages, Category.PFNZERO), where)
            self._frames = moved.read(self._fd, populated)
            return pages
        # Linux before 6.8: the bits from pagemap itself, in steps that keep a huge reservation affordable.
        columns: list[tuple[U64, U64, U64]] = [self._entries(part) for part in _steps(where)]
        page, categories, frame = (np.concatenate(column) for column in zip(*columns, strict=True))
        self._frames = moved.from_pages(page, frame)
        return _runs(page, categories)

    def _entries(self, where: Spans) -> tuple[U64, U64, U64]:
        # (address, categories, frame) of each page that is populated.
        entry = frames.entries(self._fd, where.start, where.end)
        keep = np.flatnonzero(entry >> np.uint64(62))
        state, frame = pagemap.decode(entry[keep])
        if self._zero_pfn:
            state[frame == np.uint64(self._zero_pfn)] |= np.uint32(PageState.ZERO)
        return spans.pages(where)[keep], _categories(state), frame


_STEP = 1 << 30  # bytes: 2 MiB of entries


def _steps(where: Spans) -> list[Spans]:
    # `where` in parts of at most _STEP bytes, or one span of more.
    cut = where
    if cut and int((cut.end - cut.start).max()) > _STEP:
        cut = Spans(*np.array(
            [(at, min(end, at + _STEP)) for start, end in where.pairs() for at in range(start, end, _STEP)],
            np.uint64,
        ).T.copy())  # fmt: skip
    total = (cut.end - cut.start).cumsum() // np.uint64(_STEP)
    edge = [0, *(np.flatnonzero(total[1:] != total[:-1]) + 1).tolist(), len(total)]
    return [Spans(cut.start[a:b], cut.end[a:b]) for a, b in itertools.pairwise(edge)]


def _runs(page: U64, categories: U64) -> _Pages:
    # Pages of the same categories that follow each other become one run.
    if not len(page):
        return _Pages(page, page, categories)
    size = np.uint64(PAGE_SIZE)
    cut = np.flatnonzero((page[1:] != page[:-1] + size) | (categories[1:] != categories[:-1])) + 1
    first = np.concatenate(([0], cut))
    last = np.concatenate((cut - 1, [len(page) - 1]))
    return _Pages(page[first], page[last] + size, categories[first])


_SAME = {
    PageState.PRESENT: Category.PRESENT,
    PageState.SWAPPED: Category.SWAPPED,
    PageState.FILE: Category.FILE,
    PageState.SOFT_DIRTY: Category.SOFT_DIRTY,
    PageState.ZERO: Category.PFNZERO,
}


def _categories(state: np.ndarray) -> U64:
    out = np.zeros(len(state), np.uint64)
    for mine, theirs in _SAME.items():
        out[(state & np.uint32(mine)) != 0] |= np.uint64(theirs)
    return out


def _any(pages: _Pages, without: Category) -> Spans:
    hit = (pages.categories & np.uint64(_POPULATED)) != 0
    hit &= (pages.categories & np.uint64(without)) == 0
    return spans.joined(pages.start[hit], pages.end[hit])


def _zero_frame() -> int:
    # The frame of the zero page, from a page of ours that is only read; 0 where frames are hidden.
    area = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(area, np.uint8)
    _ = int(view[0])
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = pagemap.entries(fd, int(view.ctypes.data), 1)
    finally:
        os.close(fd)
    return int(entry[0]) & pagemap.PFN_MASK if len(entry) else 0


def require_soft_dirty() -> None:
    """Raises CapabilityMissingError, with the fix, where a write does not set the bit."""
    from pagelens.linux import probe

    there, why = probe.capability_status("soft-dirty")
    if not there:
        raise CapabilityMissingError(
            f"soft-dirty does not work here: {why}",
            capability="soft-dirty",
            fix="boot a kernel with CONFIG_MEM_SOFT_DIRTY (Debian's have it), or use --backend pagescan",
        )
