"""Pages that came and went without a fault of their own: by a neighbour, left out by fork, in a hole, unlocked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pagelens import why
from support.recording import Run, assert_complete, record

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")

PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
P = 4096
def done(result): assert result == 0, os.strerror(ctypes.get_errno())
def put(base, i): ctypes.memset(base + i * P, 1, 1)
def get(base, i): ctypes.string_at(base + i * P, 1)
def anon(pages):  # between pages of another protection, so that it merges with nothing that the interpreter maps
    return libc.mmap(libc.mmap(None, (pages + 2) * P, 0, 0x22, -1, 0) + P, pages * P, 3, 0x32, -1, 0)
fd = os.open(sys.argv[1], os.O_RDWR)
for i in range(64): os.pwrite(fd, b"x", i * P)  # known to be in the page cache from here on
def private(pages): return libc.mmap(None, pages * P, 3, 2, fd, 0)
"""


def _rows(run: Run, result: why.Classified, base: int, first: int, last: int) -> list[int]:
    """Rows of the faults of pages [first, last) in order of time, since PRELUDE was through: before, the interpreter
    may have had something else there."""
    faults = result.run.faults
    began = run.rows("kind = 'syscall' and name = 'pwrite64'")[63]["time_ns"]
    inside = (faults.addr >= base + first * 4096) & (faults.addr < base + last * 4096) & (faults.time > began)
    return sorted(inside.nonzero()[0].tolist(), key=lambda r: int(faults.time[r]))


def _causes(run: Run, base: int, first: int, last: int, mm: int | None = None) -> list[tuple[int, str, str]]:
    """(page, cause, confidence) of these faults."""
    result = why.classify(run.capture)
    faults = result.run.faults
    rows = _rows(run, result, base, first, last)
    return [
        ((int(faults.addr[r]) - base) >> 12, result.of(r).cause, result.of(r).confidence)
        for r in rows
        if mm is None or int(faults.mm[r]) == mm
    ]


def _run(tmp_path: Path, program: str) -> tuple[Run, list[int]]:
    data = tmp_path / "data"
    data.write_bytes(b"x" * (64 * 4096))
    run = record(tmp_path, [sys.executable, "-c", PRELUDE + program, data])
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    return run, [int(word) for word in run.stdout.split()]


def test_a_neighbours_fault_had_mapped_it(tmp_path: Path) -> None:
    run, (base, shared) = _run(
        tmp_path,
        """
base = private(64); shared = libc.mmap(None, 64 * P, 3, 1, fd, 0)
get(base, 0)                            # maps 0 to 15: of all the pages that follow, only this one faults
done(libc.madvise(base, 64 * P, 4))
get(base, 5)                            # maps 0 to 15 once more
put(base, 40)                           # nobody had mapped that
a = -(shared // P) % 16
get(shared, a + 1); done(libc.madvise(shared, 64 * P, 4)); put(shared, a + 9)
print(base, shared)
""",
    )
    assert _causes(run, base, 0, 64) == [
        (0, "file-page-cached", "certain"),
        (5, "after-dontneed", "likely"),
        (40, "file-cow", "certain"),
    ]
    a = -(shared // 4096) % 16
    assert _causes(run, shared, 0, 64) == [
        (a + 1, "file-page-cached", "certain"),
        (a + 9, "after-dontneed", "likely"),
    ]


def test_whether_a_neighbour_had_mapped_it_depends_on_the_page_cache(tmp_path: Path) -> None:
    # Nobody knows who had read or written the file before: its pages are taken neither as cached nor as not.
    source = tmp_path / "unknown"
    source.write_bytes(b"x" * (64 * 4096))
    run, (base, a) = _run(
        tmp_path,
        f"""
other = os.open({str(source)!r}, os.O_RDONLY)
base = libc.mmap(None, 64 * P, 1, 2, other, 0); a = -(base // P) % 16
get(base, a); done(libc.madvise(base, 64 * P, 4)); get(base, a + 7)
print(base, a)
""",
    )
    result = why.classify(run.capture)
    (row,) = _rows(run, result, base, a + 7, a + 8)
    assert set(result.of(row).candidates) == {"after-dontneed", "file-page-cached"}
    assert _causes(run, base, a, a + 1) == [(a, "file-page-cached", "certain")]


def test_what_fork_left_out_cannot_be_dropped(tmp_path: Path) -> None:
    run, (read, written) = _run(
        tmp_path,
        """
read, gap, written = private(64), anon(4), private(64)
get(read, 3); get(written, 3); put(written, 60)  # only this one has page tables that fork copies
child = os.fork()
if child == 0:
    for base in (read, written):
        done(libc.madvise(base, 64 * P, 4))
        get(base, 3); put(base, 3)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(read, written)
""",
    )
    child = int(run.rows("kind = 'task' and name = 'fork'")[0]["args"][3])
    assert _causes(run, read, 0, 16, child) == [
        (3, "file-page-cached", "certain"),
        (3, "file-cow", "certain"),
    ]
    assert _causes(run, written, 0, 16, child) == [
        (3, "after-dontneed", "certain"),
        (3, "file-cow", "certain"),
    ]


def test_a_hole_takes_file_pages_and_leaves_copies(tmp_path: Path) -> None:
    run, (base,) = _run(
        tmp_path,
        """
base = private(64)
get(base, 0); put(base, 1)
done(libc.fallocate(fd, 3, 0, 64 * P))  # KEEP_SIZE, PUNCH_HOLE
get(base, 0); get(base, 1); put(base, 1)
print(base)
""",
    )
    assert [(page, cause) for page, cause, _ in _causes(run, base, 0, 16)] == [
        (0, "file-page-cached"),
        (1, "file-cow"),
        (0, "after-truncate"),
    ]


def test_holes_of_madv_remove_are_everybodys(tmp_path: Path) -> None:
    run, (mine, other) = _run(
        tmp_path,
        """
memory = os.memfd_create("m"); os.ftruncate(memory, 64 * P)
mine, other = (libc.mmap(None, 64 * P, 3, 1, memory, 0) for _ in range(2))
put(mine, 2); put(other, 2); put(other, 20)
done(libc.madvise(mine, 16 * P, 9))
put(other, 2); put(other, 20); put(mine, 2)
print(mine, other)
""",
    )
    assert _causes(run, other, 0, 64) == [
        (2, "shared-page", "certain"),
        (20, "shared-page", "certain"),
        (2, "after-truncate", "certain"),
    ]
    assert [cause for _, cause, _ in _causes(run, mine, 0, 64)] == ["shared-page", "after-dontneed"]


def test_a_part_moved_with_dontunmap_unlocks_all_of_the_vma(tmp_path: Path) -> None:
    """dontunmap_complete: so what it grows by later is not populated, nor is a page that becomes writable. On 6.12 and
    since 7.0 the rest stays locked, madvise is refused, and nothing of it faults again."""
    run, (base, refused) = _run(
        tmp_path,
        """
base, there = anon(16), anon(4)
done(libc.mprotect(there, 4 * P, 0))
done(libc.mlock(base, 16 * P))
assert libc.mremap(base + 4 * P, 4 * P, 4 * P, 7, there) == there
refused = libc.madvise(base + 8 * P, 8 * P, 4)  # allowed where it is not locked any more
done(libc.mprotect(base, 16 * P, 1)); done(libc.mprotect(base, 16 * P, 3))
for i in range(16): put(base, i)
print(base, -refused)
""",
    )
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    assert refused == (release == (6, 12) or release >= (7, 0))
    assert _causes(run, base, 0, 16) == [
        *((page, "first-write", "certain") for page in range(4, 8)),
        *((page, "after-dontneed", "certain") for page in range(8, 16) if not refused),
    ]


def test_a_call_that_populates_with_reads_maps_what_lies_around(tmp_path: Path) -> None:
    run, (base, first) = _run(
        tmp_path,
        """
base = private(64); a = -(base // P) % 16            # where a window of 16 begins
done(libc.madvise(base + (a + 20) * P, 2 * P, 22))  # MADV_POPULATE_READ of two pages: 16 to 31 are mapped
done(libc.madvise(base, 64 * P, 4))
get(base, a + 18); get(base, a + 33)
print(base, a)
""",
    )
    assert _causes(run, base, 0, 64) == [
        (first + 18, "after-dontneed", "likely"),
        (first + 33, "file-page-cached", "certain"),
    ]


def test_what_did_not_exist_when_a_neighbour_was_read(tmp_path: Path) -> None:
    run, (base, first) = _run(
        tmp_path,
        """
base = libc.mmap(None, 64 * P, 3, 0x21, -1, 0); a = -(base // P) % 16
get(base, a); put(base, a + 3)
child = os.fork()
if child == 0: put(base, a + 2); os._exit(0)
done(os.waitpid(child, 0)[1])
done(libc.madvise(base, 64 * P, 4))
put(base, a + 2)                                     # the child had made it after that read: it never was here
put(base, a + 3)
print(base, a)
""",
    )
    assert _causes(run, base, first + 2, first + 4) == [
        (first + 3, "shared-page", "certain"),
        (first + 2, "shared-page", "certain"),
        (first + 2, "shared-page", "certain"),
        (first + 3, "after-dontneed", "certain"),
    ]


def test_paged_out_before_it_was_dropped(tmp_path: Path) -> None:
    run, (base,) = _run(
        tmp_path,
        """
base = private(64)
get(base, 1)
done(libc.madvise(base, 64 * P, 21))                 # MADV_PAGEOUT: whether it could, depends on who else maps it
done(libc.madvise(base, 64 * P, 4))
get(base, 1)
print(base)
""",
    )
    result = why.classify(run.capture)
    (_, again) = _rows(run, result, base, 0, 64)
    assert set(result.of(again).candidates) == {"after-dontneed", "after-pageout"}


def test_what_was_freed_comes_back_as_the_zero_page(tmp_path: Path) -> None:
    run, (base, *gone) = _run(
        tmp_path,
        """
base = anon(256)                                     # more than one CPU's batch of pages that are given away (31)
for i in range(256): put(base, i)
done(libc.madvise(base, 256 * P, 8)); done(libc.madvise(base, 256 * P, 21))  # MADV_FREE, MADV_PAGEOUT
pagemap = os.pread(os.open("/proc/self/pagemap", os.O_RDONLY), 8 * 256, base // P * 8)
gone = [i for i in range(256) if not pagemap[8 * i + 7] >> 7]
for i in gone: get(base, i)
for i in gone: put(base, i)
print(base, *gone)
""",
    )
    assert gone
    last = _causes(run, base, 0, 256)[256:]
    assert [cause for _, cause, _ in last] == ["after-pageout"] * len(gone) + ["zero-page-write"] * len(gone)


def test_what_a_fork_left_out_is_not_dropped_for_grandchildren_either(tmp_path: Path) -> None:
    run, (base,) = _run(
        tmp_path,
        """
base = anon(8)
get(base, 1)                                         # the zero page, in a mapping that nobody has written to
child = os.fork()
if child == 0:
    done(libc.madvise(base, 8 * P, 4))               # it never was here
    grandchild = os.fork()
    if grandchild == 0: put(base, 1); os._exit(0)
    os._exit(os.waitpid(grandchild, 0)[1])
done(os.waitpid(child, 0)[1])
print(base)
""",
    )
    assert [cause for _, cause, _ in _causes(run, base, 0, 8)] == ["first-read", "first-write"]


@pytest.mark.requires("userfaultfd")
def test_what_a_handler_had_copied_is_ones_own(tmp_path: Path) -> None:
    run, (base,) = _run(
        tmp_path,
        """
import fcntl, struct, threading
base, source = anon(4), anon(1)
put(source, 0)
fd = libc.syscall(323, os.O_CLOEXEC)                 # userfaultfd
fcntl.ioctl(fd, 0xC018AA3F, struct.pack("3Q", 0xAA, 0, 0))
fcntl.ioctl(fd, 0xC020AA00, struct.pack("4Q", base, 4 * P, 1, 0))
def answer():
    os.read(fd, 32)
    fcntl.ioctl(fd, 0xC028AA03, struct.pack("5Q", base, source, P, 0, 0))  # UFFDIO_COPY
thread = threading.Thread(target=answer); thread.start()
libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]; libc.memchr(base, 0, 1)
thread.join(); os.close(fd)
r, w = os.pipe()
child = os.fork()
if child == 0: os.read(r, 1); os._exit(0)
put(base, 0)
os.write(w, b"x"); done(os.waitpid(child, 0)[1])
print(base)
""",
    )
    assert [cause for _, cause, _ in _causes(run, base, 0, 1)] == ["userfaultfd", "fork-cow-parent"]


def test_a_hole_before_what_was_dropped(tmp_path: Path) -> None:
    run, (base, first) = _run(
        tmp_path,
        """
base = private(64); a = -(base // P) % 16
get(base, a + 16); get(base, a + 32); put(base, a + 33)
done(libc.fallocate(fd, 3, a * P, 48 * P))           # PUNCH_HOLE: takes what is still the file's
os.pwrite(fd, b"x" * 48 * P, a * P)
done(libc.madvise(base, 64 * P, 4))
get(base, a + 16); put(base, a + 34); get(base, a + 33)
print(base, a)
""",
    )
    again = _causes(run, base, first + 16, first + 48)
    assert again[-3:] == [
        (first + 16, "after-truncate", "certain"),
        (first + 34, "after-truncate", "likely"),
        (first + 33, "after-dontneed", "certain"),
    ]


def test_a_neighbours_fault_does_not_map_what_was_removed(tmp_path: Path) -> None:
    run, (base, first) = _run(
        tmp_path,
        """
memfd = os.memfd_create("m")
for i in range(64): os.pwrite(memfd, b"x", i * P)
base = libc.mmap(None, 64 * P, 3, 1, memfd, 0); a = -(base // P) % 16
done(libc.madvise(base + (a + 2) * P, 3 * P, 9))     # MADV_REMOVE: 2 to 4 are not in the file any more
get(base, a + 8)                                     # maps 0 to 15 without them
done(libc.madvise(base, 64 * P, 4))
put(base, a + 3); put(base, a + 9)
print(base, a)
""",
    )
    # Who has the file open could have written to it with write(2), which is not recorded.
    assert _causes(run, base, 0, 64) == [
        (first + 8, "shared-page", "certain"),
        (first + 3, "ambiguous", "ambiguous"),
        (first + 9, "after-dontneed", "likely"),
    ]
