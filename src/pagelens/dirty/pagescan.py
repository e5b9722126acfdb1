"""Backend `pagescan`: userfaultfd in asynchronous write-protect mode, read and reset by PAGEMAP_SCAN.

The kernel write-protects the page-table entries and lifts the protection itself at the first write (no
message, no waiting thread: handle_uffd_wp in mm/memory.c, userfaultfd_wp_async); one ioctl then answers which
entries are no longer protected and protects them again, atomically per page (do_pagemap_scan). It watches
this process without privilege, and any other through a userfaultfd made there (`linux.inject`).

How one look works
1. Scan everything that is populated, protecting what was written. Unpopulated pages stay without a marker:
   markers would cost page tables for every reserved gigabyte. So a page that is present and unprotected is
   written, unless it is the zero page (a read put it there) or a private file mapping's page of the file.
2. A page that had contents at the last look and has none now was discarded: its contents changed.
3. Shared mappings are the exception: there the kernel drops entries on its own (reclaim), so they do get
   markers, and an entry without one is DROPPED: dirty for all we know.
4. Populated pages outside what is registered, and mappings that were not there: registered now, and
   everything that they hold is NEW. This also covers mremap (the moved range loses its registration) and a
   range that was unmapped and mapped anew at the same place.

Rejected: EVENT_REMAP and EVENT_UNMAP (they block the target on us); arming by UFFDIO_WRITEPROTECT alone (the
same markers); CHECK_WPASYNC on whole spans (it fails after having reset pages, whose dirt would be lost).
Quirk: whether an empty entry counts as WRITTEN differs between kernels (stable updates of 2025 changed
pagemap_page_category), so no decision here rests on it: every scan asks for PRESENT or SWAPPED.
"""

from __future__ import annotations

import contextlib
import errno
import os

import numpy as np

from pagelens.dirty import spans
from pagelens.dirty.epoch import Builder, Look, Semantics, Why
from pagelens.dirty.layout import ANON, FILE, LOW, SHARED, Layout
from pagelens.dirty.registration import Registration
from pagelens.dirty.scanner import Scanner
from pagelens.dirty.spans import Spans
from pagelens.linux import frames, pagemap
from pagelens.linux.pagescan import Category, Regions
from pagelens.linux.procfs import Process
from pagelens.linux.settings import user_space_end
from pagelens.linux.userfault import Feature, Userfault
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError
from pagelens.vm.units import PAGE_SHIFT, format_size

MARKER_LIMIT = 16 << 30  # bytes of one shared mapping: markers cost 1/512 of it in page tables
_NOT_PLAIN = int(Category.PFNZERO | Category.HUGE)


class Pagescan:
    """Watches the address space of `uffd` (made by `Userfault.create` or `inject.take_userfaultfd`, handshake
    not yet made where `handshake` is True). `ranges`: only these bytes; None: everything that can be written.
    """

    semantics = Semantics(
        name="pagescan",
        scope="any process",
        needs="Linux 6.7 (userfaultfd WP_ASYNC, PAGEMAP_SCAN); another process: ptrace rights for one call",
        extra=(Why.HUGE, Why.NEW, Why.DISCARDED, Why.DROPPED, Why.KEPT_HUGE, Why.MOVED),
        too_much="a new or moved mapping whole, with what it merged into; "
        "a huge page whole at its first write; shared pages that were "
        "reclaimed; pages that KSM merged; pages rewritten with the same bytes",
        misses="writes that do not go through this address space's page tables: another mapping of the same "
        "memory, write(2) to a mapped file, devices that write to pinned pages; mappings that come and go "
        "between two looks, and entries of a shared mapping that are dropped before it is first looked at",
        cost="0.7-1.0 µs at the first write to a page in an epoch; a write to an armed huge page splits it; "
        "adjacent mappings do not merge while watched",
    )

    def __init__(
        self,
        proc: Process,
        uffd: Userfault,
        *,
        ranges: Spans | None = None,
        keep_huge: bool = False,
        handshake: bool = True,
    ) -> None:
        self._proc = proc
        self._uffd = uffd
        self._ranges = ranges
        self._keep_huge = keep_huge
        self._fd = self._ksm = -1
        self._own = os.getpid()
        if handshake:
            uffd.handshake(Feature.WP_ASYNC | Feature.WP_UNPOPULATED)
        self._scanner = Scanner(keep_huge=keep_huge)
        self._layout = Layout(proc, ranges, MARKER_LIMIT)
        self._book = Registration(proc, uffd, self._layout)
        self._registered = spans.EMPTY
        self._content = spans.EMPTY
        self._shared = spans.EMPTY  # pages of shared mappings that were present at the last look
        self._uncertain = spans.EMPTY
        self._only_anon = False

    # -- the interface -------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Register everything that can be watched and protect what is populated."""
        self._fd = self._scanner.fd = self._proc.fd("pagemap")
        with contextlib.suppress(CapabilityMissingError):
            self._ksm = self._proc.fd("ksm_merging_pages")
        self._read_maps()
        self._book.register(self._layout.watched)
        self._book.mark_shared(self._layout.kinds[SHARED])
        found = self._collect_unknown(self._places())
        self._content, self._shared = self._contents(found), self._present_shared(found)
        self._registered = self._layout.watched

    def forget(self) -> None:
        """Treat all contents as unknown: the next look lists everything (after exec, or of a new child)."""
        self._registered = spans.EMPTY

    def contents(self) -> Spans:
        """Pages with private contents as of the last look."""
        return self._content

    def look(self) -> Look:
        """See the module."""
        regions = self._collect(self._places())
        if self._proc.pid != self._own and not self._uffd.mm_alive():
            raise TargetGoneError(f"the address space of process {self._proc.pid} is gone")
        builder = Builder()
        look = Look(builder, self._layout.vmas)
        if self._ranges is None:
            self._read_maps()
        stray = self._strays()
        content = self._contents(regions)
        if (
            self._ranges is not None
            and (stray or not spans.same(self._content, content))
            and self._read_maps()
        ):
            content = self._contents(regions)
        fresh = spans.union(
            spans.minus(self._layout.watched, self._registered), self._layout.whole_vmas(stray)
        )
        if regions.any_of & Category.WRITTEN:
            # Indices: to pick by a mask takes numpy ten times as long.
            written = np.flatnonzero(regions.categories & np.uint64(Category.WRITTEN))
            self._written(regions, written, look)
        shared = spans.EMPTY
        if fresh:
            content, shared = self._take_in(fresh, content, look)
        shared = spans.union(self._present_shared(regions), shared)
        self._lost(content, shared, look)
        if self._layout.kinds[SHARED]:
            self._dropped(regions, fresh, look)
        builder.add(self._uncertain, Why.DROPPED)
        if self._keep_huge:
            builder.add(self._huge(), Why.KEPT_HUGE)
        self._content, self._shared = content, shared
        self._registered = self._layout.watched
        look.vmas = self._layout.vmas
        look.details["content_pages"] = content.pages
        self._complaints(look)
        return look

    def close(self) -> None:
        """Closing the descriptor unregisters everything (userfaultfd_release)."""
        self._uffd.close()
        for fd in (self._fd, self._ksm):
            if fd >= 0:
                os.close(fd)
        self._fd = self._ksm = -1

    # -- parts of a look -----------------------------------------------------------------------------------

    def _written(self, regions: Regions, written: np.ndarray, look: Look) -> None:
        dirt = Spans(regions.start[written], regions.end[written])
        if self._merged():
            self._of_ksm(dirt, look)
        if self._plain() and not regions.any_of & _NOT_PLAIN:
            look.builder.add(spans.joined(*dirt), Why.WRITTEN)
            return
        categories = regions.categories[written]
        zero = (categories & np.uint64(Category.PFNZERO)) != 0
        of_file = (categories & np.uint64(Category.FILE)) != 0
        huge = (categories & np.uint64(Category.HUGE)) != 0
        for kind, where in self._layout.kinds.items():
            if not where:
                continue
            if self._plain():
                part, index = dirt, np.arange(len(dirt.start))
            else:
                part, index, _ = spans.overlaps(dirt, where)
            if not part:
                continue
            keep = np.ones(len(index), bool)
            if kind != SHARED:
                keep = ~zero[index]
                if kind == ANON:
                    look.zero_reads += Spans(part.start[~keep], part.end[~keep]).pages
            if kind == FILE:
                keep &= ~of_file[index]
            for why, mask in ((Why.WRITTEN, keep & ~huge[index]), (Why.HUGE, keep & huge[index])):
                if mask.any():
                    look.builder.add(spans.joined(part.start[mask], part.end[mask]), why)

    def _merged(self) -> bool:
        # Whether KSM has merged any page of this process (/proc/PID/ksm_merging_pages, read again in place).
        return self._ksm >= 0 and os.pread(self._ksm, 32, 0).strip() != b"0"

    def _of_ksm(self, dirt: Spans, look: Look) -> None:
        # KSM gives a page an entry without the protection bit (replace_page in mm/ksm.c), as if it was written.
        try:
            page = frames.having(self._fd, dirt.start, dirt.end, frames.KSM)
        except CapabilityMissingError:
            look.notes.append("frames are hidden: pages that KSM merged count as written")
            return
        merged = spans.joined(page, page + np.uint64(1 << PAGE_SHIFT))
        look.builder.add(spans.common(merged, self._layout.watched), Why.MOVED)

    def _take_in(self, fresh: Spans, content: Spans, look: Look) -> tuple[Spans, Spans]:
        # Mappings that we did not watch: all that they hold is new, whatever its entries say (a moved entry
        # may carry a stale protection bit). They are watched from here on. Always whole vmas: registering a
        # part (the rest lies where something else was registered before) would split them, and the program's
        # next mremap over the seam would fail with EFAULT.
        self._book.register(self._layout.whole_vmas(fresh))
        self._book.mark_shared(spans.common(fresh, self._layout.kinds[SHARED]))
        found = self._collect_unknown(fresh)
        held = self._contents(found)
        look.builder.add(held, Why.NEW)
        shared = spans.common(fresh, self._present_shared(found))
        look.builder.add(shared, Why.NEW)
        return spans.union(content, held), shared

    def _lost(self, content: Spans, shared: Spans, look: Look) -> None:
        # What had contents and has none now, or others, at an address that is still mapped, by whatever mapping.
        mapped = Spans(look.vmas.starts, look.vmas.ends)
        if replaced := self._layout.take_replaced():
            look.builder.add(spans.common(replaced, mapped), Why.DISCARDED)
        if not spans.same(content, self._content):
            gone = spans.minus(self._content, content)
            still = spans.common(gone, mapped)
            look.builder.add(still, Why.DISCARDED)
            look.unmapped_pages = gone.pages - still.pages
        if not spans.same(shared, self._shared):
            look.builder.add(spans.common(spans.minus(self._shared, shared), mapped), Why.DROPPED)

    def _present_shared(self, regions: Regions) -> Spans:
        where = self._layout.kinds[SHARED]
        if not where:
            return where
        present = np.flatnonzero(regions.categories & np.uint64(Category.PRESENT))
        return spans.common(spans.joined(regions.start[present], regions.end[present]), where)

    def _dropped(self, regions: Regions, fresh: Spans, look: Look) -> None:
        marked = spans.minus(spans.minus(self._layout.kinds[SHARED], self._layout.large), fresh)
        listed = spans.joined(regions.start, regions.end)
        empty = spans.common(spans.minus(marked, listed), self._registered)
        if empty:
            look.builder.add(empty, Why.DROPPED)
            self._book.mark_shared(empty)

    def _huge(self) -> Spans:
        found = self._scanner.scan(self._places(), mask=Category.HUGE, ret=Category.HUGE)
        return spans.common(spans.joined(found.start, found.end), self._layout.watched)

    def _complaints(self, look: Look) -> None:
        for number, size in self._book.failed.items():
            look.complete = False
            why = "another userfaultfd has it" if number == errno.EBUSY else os.strerror(number)
            look.notes.append(f"{format_size(size)} of writable memory cannot be watched: {why}")
        if errno.EBUSY in self._book.failed:
            look.notes.append(f"{self._book.foreign.pages} pages belong to the program's own userfaultfd")
        if self._layout.large:
            look.notes.append(f"{self._layout.large.pages} shared pages: a first read counts as a write")
        if look.zero_reads:
            look.notes.append(f"{look.zero_reads} pages were only read (zero page) and are not listed")

    def _read_maps(self) -> bool:
        # Returns whether anything changed.
        if not self._layout.read(self._registered):
            return False
        self._book.forget()
        kinds = self._layout.kinds
        self._only_anon = self._ranges is not None and spans.same(kinds[ANON], self._ranges)
        return True

    def _plain(self) -> bool:
        # Named ranges, all of them private anonymous memory of ours: nothing has to be cut to anything.
        return self._only_anon and not self._book.foreign

    # -- scans ---------------------------------------------------------------------------------------------

    def _places(self) -> Spans:
        # One walk of the whole address space: it passes over vmas that are not registered. Only where the
        # program has a userfaultfd of its own must the walk keep to what is ours.
        if self._ranges is not None:
            return self._ranges
        if self._book.foreign:
            return self._layout.watched
        return spans.of([(LOW, user_space_end())])

    def _collect(self, where: Spans) -> Regions:
        return self._scanner.collect(where, self._layout.kinds[FILE])

    def _collect_unknown(self, where: Spans) -> Regions:
        # Entries that were not armed by us, or not since they were. An entry may carry the uffd-wp bit of a
        # registration that its vma has lost (mremap drops the one of the vma that it merges into, and leaves
        # the entries), and after a write it carries it while writable: it would look armed for ever, and
        # every later write to it would be missed. Such bits are cleared before the entry is armed.
        found = self._collect(where)
        skip = np.uint64(Category.WRITTEN | Category.HUGE)
        private = spans.union(self._layout.kinds[ANON], self._layout.kinds[FILE])
        kept = (found.categories & skip) == 0
        stale = spans.common(spans.joined(found.start[kept], found.end[kept]), private)
        for start, end in stale.pairs():
            with contextlib.suppress(OSError):  # unmapped meanwhile
                self._uffd.writeprotect(start, end, protect=False, wake=False)
        if stale:
            self._collect(stale)
        return found

    def _strays(self) -> Spans:
        # Populated pages of vmas that we have not registered, the file's own pages left out.
        where = self._layout.walk if self._ranges is None else self._ranges
        of_file = self._layout.kinds[FILE]
        out = spans.EMPTY
        for part, skip in (
            (spans.minus(where, of_file), Category.WPALLOWED),
            (of_file, Category.WPALLOWED | Category.FILE),
        ):
            if part:
                found = self._scanner.scan(part, mask=skip, inverted=skip, ret=Category.PRESENT)
                out = spans.union(out, spans.joined(found.start, found.end))
        return spans.minus(out, self._book.foreign)

    def _contents(self, regions: Regions) -> Spans:
        # Pages with private contents: populated, no zero page, no page of the mapped file.
        if self._plain() and not regions.any_of & Category.PFNZERO:
            return spans.joined(regions.start, regions.end)
        populated = (regions.categories & np.uint64(Category.PFNZERO)) == 0
        held = spans.joined(regions.start[populated], regions.end[populated])
        if self._plain():
            return held
        out = spans.common(held, self._layout.kinds[ANON])
        if self._layout.kinds[FILE]:
            own = populated & ((regions.categories & np.uint64(Category.FILE)) == 0)
            copied = spans.joined(regions.start[own], regions.end[own])
            copied = spans.minus(spans.common(copied, self._layout.kinds[FILE]), self._markers(regions))
            out = spans.union(out, copied)
        return spans.joined(*out)

    def _markers(self, regions: Regions) -> Spans:
        # In a private file mapping, DONTNEED leaves a marker where the program's own copy was
        # (pte_install_uffd_wp_if_needed, mm/memory.c), and a marker reads as SWAPPED. Only pagemap tells them
        # apart, by the swap type, and shows it to CAP_SYS_ADMIN alone; else such pages are uncertain.
        self._uncertain = spans.EMPTY
        away = (regions.categories & np.uint64(Category.SWAPPED | Category.WRITTEN)) == Category.SWAPPED
        if not away.any():
            return spans.EMPTY
        where = spans.common(spans.joined(regions.start[away], regions.end[away]), self._layout.kinds[FILE])
        out = []
        for start, end in where.pairs():
            entry = pagemap.entries(self._fd, start, (end - start) >> PAGE_SHIFT)
            kind = entry & np.uint64(31)
            hidden = (entry & np.uint64(pagemap.PFN_MASK)) == 0
            marker = (kind == pagemap.SWP_PTE_MARKER) | hidden
            at = np.uint64(start) + (np.flatnonzero(marker).astype(np.uint64) << np.uint64(PAGE_SHIFT))
            step = np.uint64(1 << PAGE_SHIFT)
            out.append(spans.joined(at, at + step))
            unknown = np.uint64(start) + (np.flatnonzero(hidden).astype(np.uint64) << np.uint64(PAGE_SHIFT))
            self._uncertain = spans.union(self._uncertain, spans.joined(unknown, unknown + step))
        found = spans.EMPTY
        for part in out:
            found = spans.union(found, part)
        return found
