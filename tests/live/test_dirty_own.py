"""This process: the library, and the backends that watch it from inside."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

import pagelens
from pagelens.dirty import mprotect
from pagelens.dirty.epoch import Epoch
from pagelens.linux.native import lib_dir
from pagelens.vm.errors import UsageError
from support.pace import rounds
from support.subjects import Subjects

PAGE = 4096
BACKENDS = [
    pytest.param("pagescan", marks=pytest.mark.requires("uffd-wp-async")),
    pytest.param("mprotect", marks=pytest.mark.requires("native")),
    pytest.param("uffd-sync", marks=pytest.mark.requires("uffd-wp")),
]


@pytest.fixture
def area() -> Iterator[np.ndarray]:
    """256 pages of its own mapping, all written."""
    mapping = mmap.mmap(-1, 256 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(mapping, np.uint8)
    array[:] = 1
    return iter([array])


def _pages(epoch: Epoch, array: np.ndarray) -> list[int]:
    return [(int(a) - array.ctypes.data) // PAGE for a in epoch.addresses()]


@pytest.fixture
def pages(area: Iterator[np.ndarray]) -> np.ndarray:
    return next(area)


@pytest.mark.parametrize("backend", BACKENDS)
class TestEveryBackend:
    def test_lists_exactly_what_was_written(self, backend: str, pages: np.ndarray) -> None:
        with pagelens.track(backend=backend, a=pages) as tracker:
            assert _pages(tracker.epoch(), pages) == []
            pages[5 * PAGE + 7] = 9
            pages[20 * PAGE : 23 * PAGE] = 9
            _ = int(pages[100 * PAGE])
            epoch = tracker.epoch()
            assert _pages(epoch, pages) == [5, 20, 21, 22]
            assert epoch.of("a") == [(5 * PAGE, PAGE), (20 * PAGE, 3 * PAGE)]
            assert epoch.by_reason() == {"written": 4}
            assert epoch.complete
            assert _pages(tracker.epoch(), pages) == []
            pages[5 * PAGE] = 9  # the same byte again is a write again
            assert _pages(tracker.epoch(), pages) == [5]
        pages[:] = 3  # and free again
        assert int(pages.sum()) == 3 * len(pages)

    def test_random_writes_of_threads_one_epoch_after_another(self, backend: str, pages: np.ndarray) -> None:
        rng = np.random.default_rng(3)
        with pagelens.track(backend=backend, a=pages) as tracker:
            for _ in range(rounds(40)):
                chosen = rng.integers(0, 256, (3, 30))

                def write(row: np.ndarray) -> None:
                    for page in row.tolist():
                        pages[page * PAGE + 1] += 1

                threads = [threading.Thread(target=write, args=(row,)) for row in chosen]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert _pages(tracker.epoch(), pages) == sorted(set(chosen.ravel().tolist()))

    def test_no_write_is_lost_while_threads_write_during_the_looks(
        self, backend: str, pages: np.ndarray, request: pytest.FixtureRequest
    ) -> None:
        copy = pages.copy()
        stop = threading.Event()

        def write(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while not stop.is_set():
                for at in rng.integers(0, len(pages), 50).tolist():
                    pages[at] = (int(pages[at]) + 1) & 0xFF

        threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
        request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
        sys.setswitchinterval(0.0001)  # more changes of thread in less time
        with pagelens.track(backend=backend, a=pages) as tracker:
            for thread in threads:
                thread.start()
            last = rounds(100)
            for i in range(last + 1):
                if i == last:
                    stop.set()
                    for thread in threads:
                        thread.join()
                for at, size in tracker.epoch().of("a"):
                    copy[at : at + size] = pages[at : at + size]
        assert np.array_equal(copy, pages)

    def test_a_forked_childs_writes_are_its_own(self, backend: str, pages: np.ndarray) -> None:
        with pagelens.track(backend=backend, a=pages) as tracker:
            child = os.fork()
            if not child:
                try:
                    pages[:: 2 * PAGE] = 7
                    ok = int(pages[0]) == 7 and int(pages[1]) == 1
                    try:
                        tracker.epoch()
                    except UsageError:
                        os._exit(0 if ok else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(child, 0)[1] == 0
            assert _pages(tracker.epoch(), pages) == []
            pages[3 * PAGE] = 1
            assert _pages(tracker.epoch(), pages) == [3]

    def test_epochs_from_several_threads(self, backend: str, pages: np.ndarray) -> None:
        seen: list[int] = []
        with pagelens.track(backend=backend, a=pages) as tracker:

            def look() -> None:
                for _ in range(20):
                    seen.extend(_pages(tracker.epoch(), pages))

            threads = [threading.Thread(target=look) for _ in range(3)]
            for thread in threads:
                thread.start()
            for page in range(256):
                pages[page * PAGE] = 2
            for thread in threads:
                thread.join()
            seen.extend(_pages(tracker.epoch(), pages))
        assert set(seen) == set(range(256))

    def test_arguments_that_make_no_sense(self, backend: str, pages: np.ndarray) -> None:
        with pytest.raises(UsageError, match="for another one give ranges"):
            pagelens.track(backend=backend, pid=1, a=pages)
        with pytest.raises(UsageError, match="is empty"):
            pagelens.track(backend=backend, a=bytearray())
        with pytest.raises(UsageError, match="not contiguous"):
            pagelens.track(backend=backend, a=pages[::2])
        tracker = pagelens.track(backend=backend, a=pages)
        tracker.close()
        tracker.close()
        with pytest.raises(UsageError, match="closed"):
            tracker.epoch()


@pytest.mark.requires("uffd-wp")
def test_uffd_sync_says_who_wrote_where_and_when(pages: np.ndarray) -> None:
    with pagelens.track(backend="uffd-sync", a=pages) as tracker:
        ids: list[int] = []

        def write() -> None:
            ids.append(threading.get_native_id())
            pages[9 * PAGE] = 5

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        pages[4 * PAGE] = 5
        epoch = tracker.epoch()
        writes = epoch.details["writes"]
    base = pages.ctypes.data
    assert [(int(w["addr"]) - base) // PAGE for w in writes] == [9, 4]
    assert [int(w["tid"]) for w in writes] == [*ids, threading.get_native_id()]
    assert epoch.time_ns - epoch.span_ns <= int(writes["time_ns"][0]) <= int(writes["time_ns"][1])
    assert int(writes["time_ns"][1]) <= epoch.time_ns


@pytest.mark.requires("native")
def test_mprotect_barrier_and_system_calls(pages: np.ndarray) -> None:
    """Declared: a system call that writes to a protected page fails; `touch` opens it first."""
    read, write = os.pipe()
    os.write(write, b"x" * 10)
    target = memoryview(pages)[8 * PAGE : 8 * PAGE + 10]
    with pagelens.track(backend="mprotect", a=pages) as tracker:
        with pytest.raises(OSError, match="Bad address"):
            os.readv(read, [target])
        mprotect.touch(target)
        assert os.readv(read, [target]) == 10
        assert _pages(tracker.epoch(), pages) == [8]
    os.close(read)
    os.close(write)


@pytest.mark.requires("native")
def test_mprotect_tells_what_the_program_made_writable_itself(pages: np.ndarray) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with pagelens.track(backend="mprotect", a=pages) as tracker:
        assert libc.mprotect(ctypes.c_void_p(pages.ctypes.data + 10 * PAGE), 2 * PAGE, 3) == 0
        pages[10 * PAGE] = 1
        epoch = tracker.epoch()
        assert _pages(epoch, pages) == [10, 11]
        assert epoch.by_reason() == {"unguarded": 2}
        pages[10 * PAGE] = 1
        assert tracker.epoch().by_reason() == {"written": 1}


@pytest.mark.requires("native")
def test_mprotect_gets_in_front_of_a_handler_that_the_program_installs_later(pages: np.ndarray) -> None:
    before = signal.getsignal(signal.SIGSEGV)
    with pagelens.track(backend="mprotect", a=pages) as tracker:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        assert any("SIGSEGV" in note for note in tracker.epoch().notes)
        pages[PAGE] = 1
        assert _pages(tracker.epoch(), pages) == [1]
    signal.signal(signal.SIGSEGV, before)


@pytest.mark.requires("native")
def test_everything_but_the_stacks_from_inside(subjects: Subjects) -> None:
    """CASES 7: data, bss, heap, mappings, a thread; the list's own writes; the program's own handler; fork."""
    done = subprocess.run(
        [str(subjects("everything")), str(lib_dir() / "libpagelens.so")],
        capture_output=True,
        text=True,
        check=True,
    )
    checks = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [name for name, _ in checks] == [
        "watched", "listed", "unlisted", "own", "again", "chained", "chained", "fork", "ended",
    ]  # fmt: skip
    assert all(result == "1" for _, result in checks), checks


@pytest.mark.requires("uffd-wp-async")
def test_discarded_contents_are_dirt_and_zero_reads_are_not() -> None:
    mapping = mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(mapping, np.uint8)
    array[: 32 * PAGE] = 1
    with pagelens.track(m=mapping) as tracker:
        mapping.madvise(mmap.MADV_DONTNEED, 0, 4 * PAGE)
        _ = int(array[PAGE]) + int(array[40 * PAGE])  # one discarded page read again, one never touched
        epoch = tracker.epoch()
        assert epoch.by_reason() == {"discarded": 4}
        assert epoch.of("m") == [(0, 4 * PAGE)]
        assert epoch.zero_reads == 2
        assert tracker.epoch().dirty_pages == 0


@pytest.mark.requires("uffd-wp-async")
def test_shared_memory_and_another_mapping_of_it() -> None:
    fd = os.memfd_create("dirty")
    os.ftruncate(fd, 16 * PAGE)
    one, two = mmap.mmap(fd, 16 * PAGE), mmap.mmap(fd, 16 * PAGE)
    one[:] = b"1" * (16 * PAGE)
    with pagelens.track(m=one) as tracker:
        one[0] = 5
        _ = one[9 * PAGE]
        two[3 * PAGE] = 5  # declared: through another mapping
        os.pwrite(fd, b"x", 5 * PAGE)  # declared: not through page tables at all
        assert tracker.epoch().of("m") == [(0, PAGE)]
        assert "another mapping" in tracker.semantics.misses
    one.close()
    two.close()
    os.close(fd)


@pytest.mark.requires("uffd-wp-async")
def test_a_range_that_another_tracker_watches_is_said(pages: np.ndarray) -> None:
    with pagelens.track(a=pages), pagelens.track(a=pages) as second:
        epoch = second.epoch()
        assert not epoch.complete
        assert "another userfaultfd has it" in epoch.notes[0]
