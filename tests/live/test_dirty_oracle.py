"""Every backend that can watch another process, against a subject that says what it wrote.

Long runs: tools/dirty_oracle.py (10,000 epochs; seeds and results in docs/dirty.md).
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from pagelens.dirty import layout as module
from pagelens.dirty import spans
from pagelens.dirty.epoch import Look, Why
from pagelens.dirty.pagescan import Pagescan
from pagelens.dirty.track import Tracker, track
from pagelens.linux import inject
from pagelens.linux.memory import read_into
from pagelens.linux.pagescan import Category, Regions, ScanFlag
from pagelens.linux.procfs import Process
from support.dirty_oracle import Judge, Subject
from support.pace import rounds
from support.subjects import Subjects

EPOCHS = 300  # in each guest too
ROUNDS = rounds(100)
SEED = 20_000


@pytest.mark.requires("uffd-wp-async")
def test_pagescan_misses_nothing_and_explains_every_extra_page(subjects: Subjects) -> None:
    must = 0
    with Subject(subjects("dirty_oracle")) as subject, track(pid=subject.pid) as tracker:
        judge = Judge(tracker.semantics.extra)
        for i in range(EPOCHS):
            truth = subject.go(SEED + i, 20)
            epoch = tracker.epoch()
            verdict = judge(truth, epoch)
            assert not verdict.missed, (i, verdict.missed.pairs(), truth.arenas)
            assert not verdict.wrong, (i, verdict.wrong, truth.arenas)
            assert epoch.complete
            must += verdict.must
    assert must > EPOCHS * 20  # the subject did write


@pytest.mark.requires("soft-dirty")
def test_soft_dirty_misses_nothing_and_explains_every_extra_page(subjects: Subjects) -> None:
    with (
        Subject(subjects("dirty_oracle"), "dropped") as subject,
        track(pid=subject.pid, backend="soft-dirty") as tracker,
    ):
        judge = Judge(tracker.semantics.extra)
        for i in range(EPOCHS):
            truth = subject.go(SEED + i, 20)
            verdict = judge(truth, tracker.epoch())
            assert not verdict.missed, (i, verdict.missed.pairs(), truth.arenas)
            assert not verdict.wrong, (i, verdict.wrong, truth.arenas)


@pytest.mark.requires("soft-dirty", "uffd-wp-async")
def test_all_backends_at_once_agree_but_for_false_dirt(subjects: Subjects) -> None:
    with (
        Subject(subjects("dirty_oracle"), "dropped", "nohuge") as subject,
        track(pid=subject.pid, backend="all") as tracker,
    ):
        judge = Judge(tracker.semantics.extra)
        for i in range(ROUNDS // 4):
            truth = subject.go(SEED + 900 + i, 20)
            epoch = tracker.epoch()
            assert not judge(truth, epoch).missed
            for row in epoch.details["disagree"]:
                # What soft-dirty alone lists is never a write that it is sure of, except entries that mremap
                # marked (they are NEW to pagescan where they hold anything).
                assert (row["only"], row["reason"]) != ("pagescan", "written"), row


@pytest.mark.requires("uffd-wp-async")
def test_keep_huge_leaves_huge_pages_whole(subjects: Subjects) -> None:
    with (
        Subject(subjects("dirty_oracle")) as subject,
        track(pid=subject.pid, keep_huge=True) as tracker,
    ):
        judge = Judge((*tracker.semantics.extra, Why.KEPT_HUGE))
        for i in range(ROUNDS // 2):
            truth = subject.go(SEED + 5000 + i, 20)
            verdict = judge(truth, tracker.epoch())
            assert not verdict.missed, (i, verdict.missed.pairs(), truth.arenas)
            assert not verdict.wrong, (i, verdict.wrong, truth.arenas)


# -- an oracle that cannot fail proves nothing: backends broken on purpose, each must be caught ------------


class _NeverResets(Pagescan):
    def _collect(self, where: spans.Spans) -> Regions:
        return self._scanner.scan(where)


class _ForgetsDiscarded(Pagescan):
    def _lost(self, content: spans.Spans, shared: spans.Spans, look: Look) -> None:
        return


class _BlindToNewMappings(Pagescan):
    def _strays(self) -> spans.Spans:
        return spans.EMPTY

    def _read_maps(self) -> bool:
        return super()._read_maps() if not self._layout.is_read else False


class _BlindToReplacedMappings(Pagescan):
    def _lost(self, content: spans.Spans, shared: spans.Spans, look: Look) -> None:
        self._layout.take_replaced()
        super()._lost(content, shared, look)


class _DropsTheLastRegion(Pagescan):
    def _collect(self, where: spans.Spans) -> Regions:
        found = super()._collect(where)
        return Regions(found.start[:-1], found.end[:-1], found.categories[:-1])


class _BelievesEveryEntry(Pagescan):
    # Takes the zero page and the file's own pages for writes.
    def _written(self, regions: Regions, written: np.ndarray, look: Look) -> None:
        look.builder.add(
            spans.common(spans.joined(regions.start[written], regions.end[written]), self._layout.watched),
            Why.WRITTEN,
        )


class _MarksNoSharedMemory(Pagescan):
    def _dropped(self, regions: Regions, fresh: spans.Spans, look: Look) -> None:
        return


class _ResetsOutsideTheLook(Pagescan):
    # Looks first and resets later, in two steps: what is written in between is lost.
    def _collect(self, where: spans.Spans) -> Regions:
        found = self._scanner.scan(where)
        self.between()
        self._scanner.scan(where, flags=ScanFlag.WP_MATCHING, ret=Category.WRITTEN)
        return found

    def between(self) -> None:
        time.sleep(0.005)


@pytest.mark.requires("uffd-wp-async")
@pytest.mark.parametrize(
    "broken",
    [
        _NeverResets,
        _ForgetsDiscarded,
        _BlindToNewMappings,
        _BlindToReplacedMappings,
        _DropsTheLastRegion,
        _BelievesEveryEntry,
        _MarksNoSharedMemory,
    ],
)
def test_the_oracle_catches_a_backend_broken_on_purpose(subjects: Subjects, broken: type[Pagescan]) -> None:
    with Subject(subjects("dirty_oracle")) as subject:
        proc = Process.open(subject.pid)

        def make(process: Process) -> Pagescan:
            return broken(process, inject.take_userfaultfd(process)[0])

        with Tracker(proc, make) as tracker:
            judge = Judge(tracker.semantics.extra)
            for i in range(EPOCHS):
                truth = subject.go(SEED + i, 20)
                verdict = judge(truth, tracker.epoch())
                if verdict.missed or verdict.wrong:
                    return
    pytest.fail(f"{broken.__name__} was not caught")


def _image(pid: int, where: spans.Spans) -> dict[int, bytes]:
    out = {}
    for start, end in where.pairs():
        buffer = np.zeros(end - start, np.uint8)
        assert read_into(pid, start, buffer) == end - start
        for offset in range(0, end - start, 4096):
            out[start + offset] = buffer[offset : offset + 4096].tobytes()
    return out


@pytest.mark.requires("uffd-wp-async")
@pytest.mark.parametrize("broken", [False, True])
def test_a_copy_kept_by_dirty_pages_equals_the_memory_under_concurrent_writers(
    subjects: Subjects, broken: bool
) -> None:
    """Pre-copy in small: copy what each look lists while four threads write; stop them, one last look, and
    the copy must be the memory, byte for byte. A tracker that resets in a second step loses writes."""
    with Subject(subjects("dirty_oracle"), "nohuge") as subject:
        truth = subject.go(77, 120)
        proc = Process.open(subject.pid)
        kind = _ResetsOutsideTheLook if broken else Pagescan

        def make(process: Process) -> Pagescan:
            return kind(process, inject.take_userfaultfd(process)[0])

        with Tracker(proc, make) as tracker:
            arenas = spans.of((a, b) for a, b, _, _ in truth.arenas)
            copy = _image(subject.pid, arenas)
            subject.fill(5, 4)
            for _ in range(ROUNDS):
                copy |= _image(subject.pid, spans.common(tracker.epoch().spans, arenas))
            subject.halt()
            copy |= _image(subject.pid, spans.common(tracker.epoch().spans, arenas))
            wrong = sum(copy[page] != now for page, now in _image(subject.pid, arenas).items())
    assert (wrong > 0) if broken else (wrong == 0)


def test_kinds_cover_what_can_be_written() -> None:
    from pagelens.vm.vma import Prot, Vma

    rw = Prot.READ | Prot.WRITE
    assert module.kind_of(Vma(0x1000, 0x2000, rw)) == module.ANON
    assert module.kind_of(Vma(0x1000, 0x2000, Prot.NONE)) == module.ANON  # may become writable in place
    assert module.kind_of(Vma(0x1000, 0x2000, rw, inode=5, name="/x")) == module.FILE
    assert module.kind_of(Vma(0x1000, 0x2000, Prot.READ, inode=5, name="/x")) == 0
    assert module.kind_of(Vma(0x1000, 0x2000, rw, shared=True, inode=5)) == module.SHARED
    assert module.kind_of(Vma(0x1000, 0x2000, Prot.READ, shared=True, inode=5)) == 0
    assert module.kind_of(Vma(0x1000, 0x2000, Prot.READ | Prot.EXEC, name="[vdso]")) == 0
