"""The real page tables, read from /proc/kcore: the other witness for what pagemap says.

Shares nothing with pagelens nor with pagemap: types come from the kernel's BTF, addresses from kallsyms,
memory from /proc/kcore, and the walk is the processor's (PGD, with five levels P4D, PUD, PMD, PTE).
drgn would need hundreds of MB of debugging information for the same.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

PRESENT, WRITE, USER, ACCESSED, DIRTY, HUGE = (1 << b for b in (0, 1, 2, 5, 6, 7))
SOFT_DIRTY, UFFD_WP = 1 << 11, 1 << 10  # arch/x86/include/asm/pgtable_types.h: software bits 3 and 2
FRAME = 0x000FFFFFFFFFF000
FIVE_LEVELS = " la57 " in Path("/proc/cpuinfo").read_text()
_STRUCT, _UNION = 4, 5


class Btf:
    """Offsets of members (Documentation/bpf/btf.rst), by struct name; anonymous members are looked into."""

    def __init__(self, path: str = "/sys/kernel/btf/vmlinux") -> None:
        data = Path(path).read_bytes()
        magic, _, _, head, type_off, type_len, str_off, str_len = struct.unpack_from("<HBBIIIII", data)
        assert magic == 0xEB9F
        self._strings = data[head + str_off : head + str_off + str_len]
        self._types: list[tuple[int, int, list[tuple[int, int, int]]]] = [(0, 0, [])]
        self._by_name: dict[bytes, int] = {}
        at, end = head + type_off, head + type_off + type_len
        # Bytes after the common 12, by kind: fixed, and for each of vlen.
        fixed = {1: 4, 3: 12, 14: 4, 17: 4}
        each = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
        while at < end:
            name, info, _ = struct.unpack_from("<III", data, at)
            kind, vlen, flag = info >> 24 & 0x1F, info & 0xFFFF, info >> 31
            at += 12
            members = []
            if kind in (_STRUCT, _UNION):
                for i in range(vlen):
                    m_name, m_type, m_off = struct.unpack_from("<III", data, at + 12 * i)
                    members.append((m_name, m_type, m_off & 0xFFFFFF if flag else m_off))
                self._by_name.setdefault(self._string(name), len(self._types))
            self._types.append((kind, name, members))
            at += fixed.get(kind, 0) + each.get(kind, 0) * vlen

    def _string(self, offset: int) -> bytes:
        return self._strings[offset : self._strings.index(b"\0", offset)]

    def offset(self, type_name: str, member: str) -> int:
        """Byte offset of a member."""
        found = self._find(self._by_name[type_name.encode()], member.encode())
        assert found is not None, f"struct {type_name} has no {member}"
        return found // 8

    def _find(self, number: int, member: bytes) -> int | None:
        for name, kind, bits in self._types[number][2]:
            if self._string(name) == member:
                return bits
            if not name and self._types[kind][0] in (_STRUCT, _UNION):
                inner = self._find(kind, member)
                if inner is not None:
                    return bits + inner
        return None


@functools.cache
def _btf() -> Btf:
    return Btf()


@functools.cache
def _symbols() -> dict[str, int]:
    wanted = {"init_task", "page_offset_base"}
    found = {}
    with open("/proc/kallsyms") as lines:
        for line in lines:
            address, _, name = line.split()[:3]
            if name in wanted:
                found[name] = int(address, 16)
    return found


@dataclass(frozen=True)
class Entry:
    """Where a walk ended. level: 1 for a PTE, 2 for a PMD that maps 2 MiB, 3 for 1 GiB; value: the entry."""

    level: int
    value: int
    address: int

    @property
    def pfn(self) -> int:
        """The frame of the 4 KiB page that was asked for."""
        low = (1 << 12 + 9 * (self.level - 1)) - 1
        return ((self.value & FRAME & ~low) | (self.address & low)) >> 12


class Kcore:
    """The running kernel's memory. Use as a context manager."""

    def __init__(self) -> None:
        self._file: BinaryIO = open("/proc/kcore", "rb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        head = self._file.read(64)
        (phoff,) = struct.unpack_from("<Q", head, 32)
        size, number = struct.unpack_from("<HH", head, 54)
        self._file.seek(phoff)
        table = self._file.read(size * number)
        self._loads = []
        for i in range(number):
            kind, _, offset, vaddr, _, filesz, _, _ = struct.unpack_from("<IIQQQQQQ", table, i * size)
            if kind == 1:
                self._loads.append((vaddr, vaddr + filesz, offset))
        self._symbols = _symbols()
        self._btf = _btf()
        self._direct = self.word(self._symbols["page_offset_base"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        self._file.close()

    def read(self, address: int, size: int) -> bytes:
        """Kernel memory at a virtual address."""
        for start, end, offset in self._loads:
            if start <= address and address + size <= end:
                self._file.seek(offset + address - start)
                return self._file.read(size)
        raise AssertionError(f"/proc/kcore does not hold {address:#x}")

    def word(self, address: int) -> int:
        """An unsigned long."""
        return int(struct.unpack("<Q", self.read(address, 8))[0])

    def task(self, pid: int) -> int:
        """The task_struct of a process's leader: along init_task.tasks."""
        tasks, tgid = self._btf.offset("task_struct", "tasks"), self._btf.offset("task_struct", "tgid")
        first = at = self._symbols["init_task"]
        while True:
            at = self.word(at + tasks) - tasks
            assert at != first, f"no process {pid} in the kernel's list"
            if struct.unpack("<i", self.read(at + tgid, 4))[0] == pid:
                return at

    def page_table(self, pid: int) -> int:
        """The address of a process's PGD: task->mm->pgd."""
        mm = self.word(self.task(pid) + self._btf.offset("task_struct", "mm"))
        return self.word(mm + self._btf.offset("mm_struct", "pgd"))

    def walk(self, pgd: int, address: int) -> Entry | None:
        """Walks as the processor does; None where a table on the way is missing. The entry may not be
        present."""
        table = pgd
        for level in range(5 if FIVE_LEVELS else 4, 0, -1):
            value = self.word(table + (address >> 12 + 9 * (level - 1) & 0x1FF) * 8)
            if level == 1 or (level < 4 and value & PRESENT and value & HUGE):
                return Entry(level, value, address)
            if not value & PRESENT:
                return Entry(level, value, address) if value else None
            table = self._direct + (value & FRAME)
        raise AssertionError("unreachable")
