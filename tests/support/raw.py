"""The kernel's own files, read the plain way: the tests' view, which shares no code with pagelens."""

from __future__ import annotations

import re
import struct
from pathlib import Path

PAGE = 4096
PRESENT, SWAPPED, FILE, EXCLUSIVE, UFFD_WP, SOFT_DIRTY = (1 << b for b in (63, 62, 61, 56, 57, 55))
PFN = (1 << 55) - 1


def pagemap(pid: int, address: int, pages: int) -> list[int]:
    """The pagemap entries of a range (Documentation/admin-guide/mm/pagemap.rst)."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        data = b""
        while len(data) < pages * 8:
            more = file.read(pages * 8 - len(data))
            assert more, f"pagemap ended at page {len(data) // 8} of {pages}"
            data += more
    return list(struct.unpack(f"<{pages}Q", data))


def bits(pid: int, address: int, pages: int, mask: int) -> int:
    """How many pages of a range have a pagemap bit."""
    return sum(1 for entry in pagemap(pid, address, pages) if entry & mask)


def frame(kind: str, pfn: int) -> int:
    """The word of a page frame in /proc/kpagecount, kpageflags or kpagecgroup."""
    with open(f"/proc/kpage{kind}", "rb", buffering=0) as file:
        file.seek(pfn * 8)
        return int(struct.unpack("<Q", file.read(8))[0])


def clear_soft_dirty(pid: int) -> None:
    """4 into clear_refs."""
    Path(f"/proc/{pid}/clear_refs").write_text("4")


def faults(pid: int) -> tuple[int, int]:
    """(min_flt, maj_flt) of a process, all its threads (proc(5), stat fields 10 and 12)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]), int(fields[9])


def vmas(pid: int) -> list[tuple[int, int, str, str]]:
    """(start, end, permissions, name) of each vma."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in parts[0].split("-"))
        found.append((start, end, parts[1], parts[5] if len(parts) > 5 else ""))
    return found


def vma_at(pid: int, address: int) -> tuple[int, int, str, str]:
    """The vma over an address."""
    return next(v for v in vmas(pid) if v[0] <= address < v[1])


def vmas_in(pid: int, address: int, pages: int) -> int:
    """How many vmas touch a range."""
    return sum(1 for v in vmas(pid) if v[0] < address + pages * PAGE and v[1] > address)


def smaps(pid: int, address: int) -> dict[str, int | str]:
    """smaps fields of the vma over an address: sizes in kB, VmFlags as text."""
    fields: dict[str, int | str] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            number = re.fullmatch(r"(\d+)( kB)?", value.strip())
            fields[name] = int(number[1]) if number else value.strip()
    return fields


def status(pid: int, field: str) -> int:
    """A number of /proc/PID/status, in kB where it is a size."""
    return int(
        next(
            x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith(f"{field}:")
        ).split()[1]
    )


def setting(path: str) -> str:
    """A setting; of a list such as `always [madvise] never` the chosen word."""
    text = Path(path).read_text().strip()
    match = re.search(r"\[(.+?)\]", text)
    return match[1] if match else text
