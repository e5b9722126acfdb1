"""Names of numbers."""

from __future__ import annotations

from pagelens.vm import names


def test_call_text() -> None:
    text = names.call_text("mmap", [0, 8192, 3, 0x22, 0xFFFFFFFFFFFFFFFF, 0], 0x7F0000000000)
    assert text == "mmap(NULL, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000"
    assert names.call_text("madvise", [0x1000, 4096, 4], 0) == "madvise(0x1000, 4096, MADV_DONTNEED) = 0"
    assert names.call_text("munmap", [0x1001, 4096], -22) == "munmap(0x1001, 4096) = -1 EINVAL"


def test_flags() -> None:
    assert names.flag_names(0x22 | 1 << 40, names._tables.MAP) == "MAP_PRIVATE|MAP_ANONYMOUS|0x10000000000"
    assert names.page_flag_names(1 << 12 | 1 << 24) == ["ANON", "ZERO_PAGE"]
    assert names.vm_flag_meanings(frozenset({"wr", "rd", "zz"})) == {
        "rd": "readable", "wr": "writable", "zz": "?",
    }  # fmt: skip


def test_system_calls_agree_with_each_other() -> None:
    assert names.SYSCALL_NUMBERS["mseal"] == 462
    assert names.SYSCALLS[9] == "mmap"
    assert set(names.SYSCALL_ARGS) <= set(names.SYSCALL_NUMBERS)
