"""Increments that read only what was written: the process is watched from one checkpoint to the next.

Watching is asynchronous write protection (`dirty.pagescan`): while the process is held, one walk of its page
tables names what was written and protects it again, so no write can fall between two checkpoints. Then only those
pages are read. Shared memory is read whole each time and compared by content, because writes through another
mapping are not seen; so is what cannot be watched.

If anything does not fit (a page without contents in the parent that nobody is known to have written), the caller
falls back to comparing contents; it is never assumed unchanged.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.dump import Result, memory_budget, result, slices, store_pages
from pagelens.checkpoint.image import Kind, ProcessState, Rows, compress, per_page
from pagelens.checkpoint.listing import Listing
from pagelens.checkpoint.reuse import Reuse
from pagelens.checkpoint.state import identities, prepare, read_state
from pagelens.checkpoint.store import Writer
from pagelens.checkpoint.stored import Stored
from pagelens.dirty import spans
from pagelens.dirty.epoch import Why
from pagelens.dirty.pagescan import Pagescan
from pagelens.dirty.spans import Spans
from pagelens.linux import pagecopy, pagescan
from pagelens.linux.hold import Held
from pagelens.linux.inject import take_userfaultfd
from pagelens.linux.pagescan import Category, Regions
from pagelens.linux.procfs import Process
from pagelens.linux.settings import user_space_end
from pagelens.vm.closing import Closing
from pagelens.vm.pages import PageRuns, PageState
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import VmaList

_STATES = (
    (Category.PRESENT, PageState.PRESENT),
    (Category.SWAPPED, PageState.SWAPPED),
    (Category.FILE, PageState.FILE),
    (Category.PFNZERO, PageState.ZERO),
    (Category.HUGE, PageState.HUGE),
    (Category.GUARD, PageState.GUARD),
)
METHOD = "all threads held, written pages by userfaultfd WP_ASYNC and PAGEMAP_SCAN"


class CannotTellError(Exception):
    """The increment cannot be made from what was watched; contents must be compared."""


class _Recording(Pagescan):
    """Keeps what its last walk of everything found, so that page states cost no second walk."""

    last: Regions | None = None
    covered = spans.EMPTY  # what that walk did not pass over

    def _collect(self, where: Spans) -> Regions:
        found = super()._collect(where)
        if spans.same(where, self._places()):
            self.last = found
            self.covered = self._registered or self._layout.watched
        return found

    def unwatched(self) -> Spans:
        """Writable memory that cannot be watched: droppable (MAP_DROPPABLE, where glibc 2.41 keeps the state of
        getrandom), or the program's own userfaultfd has it."""
        return self._book.foreign


class Watched(Closing):
    """One process, watched between checkpoints. Context manager; closing it leaves nothing in the process.

    Raises CapabilityMissingError where it cannot be watched (Linux before 6.7, seccomp, …).
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.proc = Process.open(pid)
        self._backend: _Recording | None = None
        self._mem: pagecopy.MemoryFile | None = None
        self._pagemap = -1
        self._vmas = VmaList()  # of the last checkpoint
        self._listing = Listing(self.proc)
        prepare()
        # Used again by each increment: fresh memory would cost faults while the process is held.
        self._room = pagecopy.buffer(4096, ready=True)
        try:
            uffd, _ = take_userfaultfd(self.proc)
            self._backend = _Recording(self.proc, uffd)
            self._mem = pagecopy.MemoryFile(pid)
            self._pagemap = self.proc.fd("pagemap")
            self._armed = False
        except BaseException:
            self.close()
            raise

    def take(self, out: Path, parent: Path | None, *, level: int = 1, with_files: bool = False) -> Result:
        """The next checkpoint, as an increment over `parent` (None: full).

        Raises CannotTellError (nothing was written; compare contents instead), and as `dump`.
        """
        assert self._backend is not None
        began = time.monotonic_ns()
        try:
            with Writer(out, level=level) as writer:
                reuse = Reuse(writer.final, parent, None)
                return self._take(writer, reuse, with_files, began)
        except BaseException:
            self._backend.forget()  # what this look reported is lost to the next one
            raise

    def _take(self, writer: Writer, reuse: Reuse, with_files: bool, began: int) -> Result:
        assert self._mem is not None
        if reuse.parent is not None:
            _ = reuse.parent.rows  # read from disk before the process is held, not while
        self._listing.ahead()
        held = Held(self.pid)
        with held:
            state, plan, start, count = self._observe(held, reuse.parent, with_files)
            pages = int(count.sum())
            if pages * PAGE_SIZE > memory_budget():
                raise CannotTellError("more pages than fit into memory")
            room = self._room
            if len(room) < pages * PAGE_SIZE:
                room = pagecopy.buffer(pages + pages // 2)
                if reuse.parent is not None:  # a full one is large; what follows is not
                    self._room = room
            data = room[: pages * PAGE_SIZE]
            bad = pagecopy.read(self.pid, self._mem, start, count, data)
        state = replace(state, backing=identities(self.proc, state.vmas))
        rows, counts = _rows(writer, reuse, plan, (start, count, data, bad))
        unreadable = int(rows["pages"][rows["kind"] == Kind.UNREADABLE].sum())
        meta = {
            "parent": reuse.parent_entry(),
            "origins": reuse.origins,
            "method": METHOD if reuse.parent is not None else "all threads held, full",
            "complete": not unreadable,
            "notes": [*state.notes, *plan.notes],
            "range": None,
            "holes": [],
            "stopped_ns": held.held_ns,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        path = writer.finish(state, rows, meta)
        return result(path, writer, rows, counts, meta, time.monotonic_ns() - began)

    def _observe(
        self, held: Held, parent: Stored | None, with_files: bool
    ) -> tuple[ProcessState, plans.Plan, Any, Any]:
        # Everything that must be of one instant.
        assert self._backend is not None
        if self._armed:
            look = self._backend.look()
            written = look.builder.seen
            begin, count, why = look.builder.columns()
            gone = np.isin(why, (Why.NEW, Why.DISCARDED, Why.DROPPED))
            emptied = spans.joined(begin[gone], (begin + (count << np.uint64(PAGE_SHIFT)))[gone])
        else:
            self._backend.arm()
            self._armed = True
            written, emptied = spans.of([(0, user_space_end())]), spans.EMPTY
        before = self._vmas
        vmas = self._listing.now()
        known = {(v.start, v.end) for v in before}
        fresh = spans.of([(v.start, v.end) for v in vmas if (v.start, v.end) not in known])
        if parent is not None:
            guards = parent.rows[parent.rows["kind"] == Kind.GUARD]
            ends = guards["start"] + (guards["pages"] << np.uint64(PAGE_SHIFT))
            fresh = spans.union(spans.union(fresh, emptied), Spans(guards["start"], ends))
        plan = plans.make(self.proc, vmas, self._states(vmas, fresh, emptied), with_files=with_files)
        if parent is None:
            written = spans.of([(0, user_space_end())])
        rows = plan.rows[plan.rows["kind"] == Kind.DATA]
        ends = rows["start"] + (rows["pages"] << np.uint64(PAGE_SHIFT))
        everything = Spans(rows["start"], ends)
        shared = spans.of([(v.start, v.end) for v in vmas if v.shared or v.name == "[vdso]"])
        unwatched = self._backend.unwatched()
        if unwatched and parent is not None:
            plan.notes.append(f"{unwatched.pages} pages cannot be watched; they were compared by contents")
        wanted = spans.common(everything, spans.union(written, spans.union(shared, unwatched)))
        self._vmas = vmas
        state = read_state(self.proc, held, vmas, backing=False)
        return state, plan, wanted.start, (wanted.end - wanted.start) >> np.uint64(PAGE_SHIFT)

    def _states(self, vmas: VmaList, guards_in: Spans, unsure: Spans) -> PageRuns:
        # From the walk that found what was written; guard pages, which it leaves out, only where there can be
        # any: in new mappings, where contents went away, and where there were some.
        assert self._backend is not None
        found = self._backend.last
        assert found is not None
        has_guards = Category.GUARD & pagescan.supported()
        # That walk passes over what is not watched (read-only mappings of files, the vDSO) or was not yet.
        mapped = spans.joined(vmas.starts, vmas.ends)
        others = spans.union(spans.minus(mapped, self._backend.covered), unsure)
        rest = spans.minus(spans.of([(0, user_space_end())]), others)
        part, index, _ = spans.overlaps(Spans(found.start, found.end), rest)
        parts = [Regions(part.start, part.end, found.categories[index])]
        if has_guards and guards_in:
            where = spans.minus(guards_in, others)
            parts.append(pagescan.scan(self._pagemap, where.pairs(), mask=has_guards, ret=has_guards))
        populated = Category.PRESENT | Category.SWAPPED
        want = populated | Category.FILE | Category.PFNZERO | Category.HUGE | has_guards
        parts.append(pagescan.scan(self._pagemap, others.pairs(), anyof=populated | has_guards, ret=want))
        start = np.concatenate([p.start for p in parts])
        order = np.argsort(start, kind="stable")
        start, end = start[order], np.concatenate([p.end for p in parts])[order]
        categories = np.concatenate([p.categories for p in parts])[order]
        state = np.zeros(len(start), np.uint32)
        for category, bit in _STATES:
            state |= np.where((categories & np.uint64(category)) != 0, np.uint32(bit), np.uint32(0))
        state[(state & np.uint32(PageState.GUARD)) != 0] &= ~np.uint32(PageState.SWAPPED)
        return PageRuns(start, (end - start) >> np.uint64(PAGE_SHIFT), state)

    def close(self) -> None:
        """Stop watching. Twice is harmless."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        if self._mem is not None:
            self._mem.__exit__()
            self._mem = None
        if self._pagemap >= 0:
            import os

            os.close(self._pagemap)
            self._pagemap = -1
        self.proc.close()


def _rows(
    writer: Writer, reuse: Reuse, plan: plans.Plan, read: tuple[Any, Any, Any, Any]
) -> tuple[Rows, dict[str, int]]:
    # Rows of the read pages (stored or found unchanged), of pages taken over from the parent, and the others.
    start, count, data, bad = read
    flat = per_page(plan.rows)
    is_data = flat["kind"] == Kind.DATA
    ends = start + (count << np.uint64(PAGE_SHIFT))
    at = np.searchsorted(start, flat["start"], side="right").astype(np.int64) - 1
    here = is_data & (at >= 0)
    if len(start):
        here &= flat["start"] < ends[np.maximum(at, 0)]
    taken = flat[here].copy()
    taken["first"] = np.arange(len(taken), dtype=np.uint32)
    taken["block"] = -1
    stored, counts = store_pages(
        writer, reuse, plans.Plan(taken, start, count, plan.notes), slices(data, bad)
    )
    rest = flat[is_data & ~here].copy()
    if len(rest):
        if reuse.parent is None:
            raise CannotTellError("pages were not read")
        where = reuse.parent.locate(rest["start"])
        if not np.isin(where.kind, (Kind.DATA, Kind.ZERO)).all():
            raise CannotTellError("pages that nobody is known to have written are not in the parent")
        rest["kind"] = where.kind
        has = where.kind == Kind.DATA
        rest["origin"][has] = reuse.translate(where.origin[has])
        rest["block"][has], rest["first"][has] = where.block[has], where.first[has]
        for name in ("origin", "block", "first"):
            rest[name][~has] = 0
    others = flat[~is_data].copy()
    for name in ("origin", "block", "first"):
        others[name] = 0
    merged = np.concatenate((per_page(stored), rest, others))
    return compress(merged[np.argsort(merged["start"], kind="stable")]), counts
