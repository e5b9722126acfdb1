"""Reading a little of a process's memory without changing it.

Reading an absent page of another process maps it there (a fault in its name, the zero page at least), and on
a range registered with userfaultfd it waits for a handler; so only pages that pagemap shows as present are
read. /proc/PID/mem is opened through the process's own /proc handle: a reused pid cannot answer.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

import numpy as np

from pagelens.linux.procfs import Process
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE


class Peek:
    """Use as a context manager. Raises as Process.fd does."""

    def __init__(self, proc: Process) -> None:
        self._mem = proc.fd("mem")
        try:
            self._pagemap = proc.fd("pagemap")
        except BaseException:
            os.close(self._mem)
            raise

    def present(self, addr: int) -> bool:
        """Whether the page of `addr` is present now."""
        try:
            entry = os.pread(self._pagemap, 8, (addr >> PAGE_SHIFT) * 8)
        except OSError:
            return False
        return len(entry) == 8 and entry[7] >> 7 == 1

    def read(self, addr: int, length: int) -> bytes:
        """`length` bytes, or fewer up to the first page that is not present. Never faults a page in."""
        end = addr
        while end < addr + length and self.present(end):
            end = min((end | (PAGE_SIZE - 1)) + 1, addr + length)
        if end == addr:
            return b""
        try:
            return os.pread(self._mem, end - addr, addr)
        except OSError:
            return b""  # gone meanwhile, or not readable (I/O memory)

    def words(self, addr: int, count: int) -> list[int]:
        """Up to `count` 64-bit words."""
        data = self.read(addr, count * 8)
        return [int(w) for w in np.frombuffer(data[: len(data) & ~7], dtype=np.uint64)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self._mem)
        os.close(self._pagemap)
