"""Program headers and build-id of an ELF file: where its segments lie, which part is relro, how long the bss
is.

Only the headers, a few hundred bytes; symbols and lines are drgn's business (`symbols`).
Source: elf(5), System V gABI.
"""

from __future__ import annotations

import functools
import os
import struct
from dataclasses import dataclass

PT_LOAD, PT_NOTE, PT_GNU_RELRO = 1, 4, 0x6474E552
_NT_GNU_BUILD_ID = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header. All in bytes; flags: PF_X 1, PF_W 2, PF_R 4."""

    type: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    memsz: int


@dataclass(frozen=True, slots=True)
class ElfFile:
    """What the headers say. build_id: hexadecimal, "" without one. dynamic: ET_DYN (loaded at a bias)."""

    segments: tuple[Segment, ...]
    build_id: str
    dynamic: bool

    def loads(self) -> list[Segment]:
        """PT_LOAD segments."""
        return [s for s in self.segments if s.type == PT_LOAD]

    def vaddr_of(self, offset: int) -> int | None:
        """Link-time address of a file offset, or None outside of all segments."""
        for s in self.loads():
            low = s.offset & ~4095
            if low <= offset < s.offset + s.filesz + 4095 & ~4095:
                return s.vaddr - s.offset + offset
        return None


def read(path: str, inode: int) -> ElfFile | None:
    """The headers of the file at `path`, if it has this inode number and is an ELF file."""
    try:
        info = os.stat(path)  # noqa: PTH116 (once per library; no path object needed)
    except OSError:
        return None
    # On overlay and btrfs maps shows another device than stat does, so only the inode number is compared.
    if info.st_ino != inode:
        return None
    return _read(path, info.st_ino, info.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _read(path: str, inode: int, mtime: int) -> ElfFile | None:  # noqa: ARG001 (the cache's key)
    try:
        with open(path, "rb") as file:
            return parse(file.read(4096), lambda at, size: os.pread(file.fileno(), size, at))
    except (OSError, struct.error):
        return None


def parse(head: bytes, more: object = None) -> ElfFile | None:
    """From the first bytes; `more(offset, size)` reads what lies beyond. None if it is no 64-bit ELF file."""
    if head[:6] != b"\x7fELF\x02\x01":
        return None
    kind, phoff, phentsize, phnum = struct.unpack_from("<H14xQ", head, 16) + struct.unpack_from(
        "<HH", head, 54
    )
    table = _slice(head, more, phoff, phentsize * phnum)
    segments = []
    build_id = ""
    for i in range(phnum):
        p_type, flags, offset, vaddr, _, filesz, memsz, _ = struct.unpack_from(
            "<IIQQQQQQ", table, i * phentsize
        )
        segments.append(Segment(p_type, flags, offset, vaddr, filesz, memsz))
        if p_type == PT_NOTE and not build_id:
            build_id = _build_id(_slice(head, more, offset, min(filesz, 4096)))
    return ElfFile(tuple(segments), build_id, kind == 3)


def _slice(head: bytes, more: object, at: int, size: int) -> bytes:
    if at + size <= len(head) or not callable(more):
        return head[at : at + size]
    return bytes(more(at, size))


def _build_id(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        namesz, descsz, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + namesz]
        desc = at + 12 + (namesz + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and name == b"GNU\0":
            return notes[desc : desc + descsz].hex()
        at = desc + (descsz + 3 & ~3)
    return ""
