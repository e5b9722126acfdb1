"""A program with known numbers of faults of each sort, matched one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.recording import Run, assert_complete, record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")
PAGE = 4096


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, subjects: Subjects) -> Run:
    return record(tmp_path_factory.mktemp("known"), [subjects("known_faults")])


@pytest.fixture(scope="module")
def ranges(run: Run) -> dict[str, int]:
    names = ("plain", "read_first", "kernel", "bad", "none", "populated", "locked")
    lines = run.stdout.splitlines()
    values = lines[0].split()
    assert values[7] == "17"
    found = {name: int(value, 16) for name, value in zip(names, values, strict=False)}
    return found | {"exit": int(lines[1], 16)}


def faults(run: Run, start: int, pages: int) -> list[dict[str, Any]]:
    """Since main() made its first range: a later one may lie where the loader had read ld.so.cache."""
    began = f"select min(time_ns) from events where name = 'mmap' and args[2] = {300 * PAGE}"
    place = f"addr >= {start} and addr < {start + pages * PAGE}"
    return run.rows(f"kind = 'fault' and {place} and time_ns > ({began})")


def test_complete(run: Run) -> None:
    assert run.returncode == 0
    assert_complete(run)
    # 16 in the protected range, 2 in the unmapped page, 1 by the kernel at exit (see test_exit_time).
    assert run.faults["failed"] == 19


def test_ordinary(run: Run, ranges: dict[str, int]) -> None:
    found = faults(run, ranges["plain"], 300)
    assert [f["addr"] for f in found] == [ranges["plain"] + i * PAGE for i in range(300)]
    assert {(f["error_code"], f["user_mode"], f["failed"], f["major"]) for f in found} == {
        (6, True, False, False)
    }
    assert all(f["latency_ns"] > 0 and f["in_syscall"] is None and f["stack_id"] is not None for f in found)
    assert len({f["ip"] for f in found}) == 1


def test_zero_page_then_write(run: Run, ranges: dict[str, int]) -> None:
    found = faults(run, ranges["read_first"], 40)
    assert [f["error_code"] for f in found] == [4] * 40 + [7] * 40


def test_kernel_mode(run: Run, ranges: dict[str, int]) -> None:
    found = faults(run, ranges["kernel"], 24)
    assert [f["addr"] // PAGE for f in found] == [ranges["kernel"] // PAGE + i for i in range(24)]
    assert {(f["error_code"], f["user_mode"], f["in_syscall"]) for f in found} == {(2, False, 0)}


def test_gup_is_known_call_by_call(run: Run, ranges: dict[str, int]) -> None:
    assert not faults(run, ranges["populated"], 64)
    assert not faults(run, ranges["locked"], 32)
    calls = run.rows("kind = 'syscall' and gup > 0 and name != 'execve'")
    assert [(c["name"], c["gup"]) for c in calls] == [("mmap", 64), ("mlock", 32), ("madvise", 20)]
    assert calls[0]["result"] == ranges["populated"]
    assert calls[1]["args"] == [ranges["locked"], 32 * PAGE]
    assert calls[2]["args"][1:] == [20 * PAGE, 23]
    total = sum(r["gup"] for r in run.rows("gup > 0"))
    assert total == run.faults["gup"]


def test_failed(run: Run, ranges: dict[str, int]) -> None:
    bad = faults(run, ranges["bad"], 16)
    assert [f["addr"] for f in bad] == [ranges["bad"] + i * PAGE for i in range(16)]
    assert {(f["error_code"], f["user_mode"], f["failed"], f["major"]) for f in bad} == {
        (6, True, True, None)
    }
    unmapped = [f for f in faults(run, ranges["none"], 1) if f["failed"]]
    assert [(f["error_code"], f["user_mode"], f["in_syscall"]) for f in unmapped] == [
        (6, True, None),
        (2, False, 0),
    ]


def test_exit_time(run: Run, ranges: dict[str, int]) -> None:
    (found,) = [f for f in faults(run, ranges["exit"], 1) if not f["failed"]]
    assert (found["user_mode"], found["in_syscall"], found["error_code"]) == (False, 60, 0)
    # The head reads as zeros: the kernel follows its next pointer to address 0, and gives up.
    (null,) = run.rows("kind = 'fault' and failed and addr = 0")
    assert (null["user_mode"], null["in_syscall"], null["error_code"]) == (False, 60, 0)
    (exit_,) = run.rows("kind = 'task' and name = 'exit'")
    assert exit_["args"][2] == run.faults["recorded"]


def test_calls_have_arguments_results_and_files(run: Run) -> None:
    files = run.rows(
        "kind = 'syscall' and name = 'mmap' and file_inode is not null and detail like 'libc.so%'"
    )
    assert files
    status = Path("/usr/lib/x86_64-linux-gnu/libc.so.6").stat()
    assert {(f["file_dev"], f["file_inode"]) for f in files} == {(status.st_dev, status.st_ino)}
    protects = run.rows("kind = 'syscall' and name = 'mprotect' and args[3] = 0")
    assert [p["args"][1] for p in protects] == [16 * PAGE]
    (exec_,) = run.rows("kind = 'syscall' and name = 'execve'")
    assert exec_["result"] == 0


def test_snapshots(run: Run, ranges: dict[str, int]) -> None:
    rows = run.capture.snapshot_rows()
    assert [(r["moment"], r["mm"]) for r in rows] == [("exec", 1), ("exit", 1)]
    first, last = run.capture.snapshot(1), run.capture.snapshot(2)
    assert first.vmas.find(ranges["plain"]) is None
    assert last.pages is not None and last.accounting is not None
    assert last.pages.clipped(ranges["plain"], ranges["plain"] + 300 * PAGE).pages == 300
    assert last.accounting.total["Rss"] > 300 * PAGE
    assert last.complete


def test_page_cache_of_mapped_files(run: Run) -> None:
    rows = run.capture.table("file_pages").to_pylist()
    last = max(r["snapshot"] for r in rows)
    libc = [r for r in rows if r["snapshot"] == last and r["path"].endswith("libc.so.6")]
    status = Path("/usr/lib/x86_64-linux-gnu/libc.so.6").stat()
    assert {r["inode"] for r in libc} == {status.st_ino}
    cached = sum(r["count"] for r in libc)
    assert 0 < cached <= -(-status.st_size // PAGE)
    # Its first page (the ELF header) is mapped by everyone, so its folio is known.
    assert next(r["order"] for r in libc if r["start"] == 0) is not None


# Each call of docs/recording that a program can make by itself; mseal where the kernel has it.
MEMORY_CALLS = (
    "mmap munmap mprotect pkey_mprotect mremap madvise process_madvise brk mlock mlock2 mlockall munlock"
    " munlockall msync mbind memfd_create ftruncate fallocate shmat shmdt userfaultfd prctl prlimit64 io_setup"
    " io_uring_setup io_uring_register vfork clone clone3 execve pwrite64 fsync process_vm_writev"
    " write exit_group"
)


def test_every_call_that_shapes_memory_is_there(tmp_path: Path, subjects: Subjects) -> None:
    run = record(tmp_path, [subjects("every_call")])
    assert_complete(run)
    calls = run.rows("kind = 'syscall'")
    assert not set(MEMORY_CALLS.split()) - {c["name"] for c in calls}
    # The parent's memory, written by its child; and clear_refs, by the program itself.
    (written,) = [c for c in calls if c["name"] == "process_vm_writev" and c["result"] == 8]
    assert written["args"][0] == min(c["pid"] for c in calls if c["name"] == "memfd_create")
    assert [c for c in calls if c["name"] == "write" and c["detail"] == str(c["pid"])]
    # PR_SET_THP_DISABLE, and not PR_SET_NAME, which has nothing to do with memory.
    assert [c["args"][0] for c in calls if c["name"] == "prctl"] == [41]
