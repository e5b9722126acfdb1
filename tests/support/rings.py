"""A ring as the kernel's BPF ring buffers are laid out, in a memfd, filled by the test; and the drain on it."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Self

from pagelens.linux.drain import Drain, DrainStats

PAGE = 4096
BUSY, DISCARD = 1 << 31, 1 << 30
FAULT, SYSCALL, SWITCH, BATCH = 1, 2, 6, 9
HEAD = struct.Struct("<BBBBhHIIIIQQQ")
ROWS = {
    "faults": 64,
    "switches": 64,
    "calls": 136,
    "raw": 8 + 16 + 17 * 8 + 1024,
}  # bytes of a row in a segment


def record(
    kind: int, *, flags: int = 0, frames: tuple[int, ...] = (), text: bytes = b"", mm: int = 1
) -> bytes:
    """One record, whole and in order."""
    head = HEAD.pack(kind, flags, len(frames), len(text), -1, 0, 1, 1, mm, 0, 5, 0, 0x1000)
    fixed = head + bytes(8 if kind in (FAULT, SWITCH) else 72)
    return fixed + struct.pack(f"<{len(frames)}Q", *frames) + text


class Ring:
    """One ring of `size` bytes with a drain; `put` as the kernel reserves and commits."""

    def __init__(self, directory: Path, size: int = PAGE, at: int = 0) -> None:
        self.directory, self.size, self.producer = directory, size, at
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * size)
        self._positions(at, at)
        self.drain = Drain([-1, self.fd], size, directory)

    def _positions(self, consumer: int, producer: int) -> None:
        os.pwrite(self.fd, struct.pack("<Q", consumer), 0)
        os.pwrite(self.fd, struct.pack("<Q", producer), PAGE)

    @property
    def consumer(self) -> int:
        """What the drain has taken, bytes."""
        return int(struct.unpack("<Q", os.pread(self.fd, 8, 0))[0])

    def put(self, data: bytes, marks: int = 0, length: int | None = None) -> None:
        """A record at the producer's end, in both mappings of the data; length: what its header claims."""
        whole = struct.pack("<II", (len(data) if length is None else length) | marks, 0) + data
        whole += bytes(-len(whole) % 8)
        for i in range(0, len(whole), 8):
            spot = (self.producer + i) % self.size
            for copy in (0, self.size):
                os.pwrite(self.fd, whole[i : i + 8], 2 * PAGE + copy + spot)
        self.producer += len(whole)
        os.pwrite(self.fd, struct.pack("<Q", self.producer), PAGE)

    def rows(self, segment: int, which: str) -> bytes:
        """What a closed segment holds."""
        return (self.directory / f"{segment:08d}.{which}").read_bytes()

    @property
    def stats(self) -> DrainStats:
        """The drain's figures."""
        return self.drain.stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drain.stop()
        self.drain.free()
        os.close(self.fd)
