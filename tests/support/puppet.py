"""A child process that maps, touches, forks, starts threads as a test tells it (subjects/puppet.c)."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from support import raw

PAGE = 4096
NR = {
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28, "shmget": 29,
    "shmat": 30, "shmctl": 31, "mlock": 149, "munlock": 150, "memfd_create": 319, "open": 2, "ftruncate": 77,
    "prctl": 157, "setuid": 105, "setgid": 106, "write": 1, "userfaultfd": 323, "mlockall": 151,
    "sigaltstack": 131, "seccomp": 317, "io_setup": 206,
}  # fmt: skip
PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
RW = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANON, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
MAP_HUGETLB = 0x40000
MADV = {
    "DONTNEED": 4,
    "FREE": 8,
    "HUGEPAGE": 14,
    "NOHUGEPAGE": 15,
    "COLLAPSE": 25,
    "GUARD_INSTALL": 102,
    "GUARD_REMOVE": 103,
}


class Puppet:
    """Use as a context manager; killed at the end."""

    def __init__(self, program: Path, *prefix: str) -> None:
        self._child = subprocess.Popen(
            [*prefix, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.pid, self.line = self._answer()

    def _answer(self) -> tuple[int, int]:
        assert self._child.stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            byte = self._child.stdout.read(1)
            assert byte, "the subject program ended"
            text += byte
        first, second = text.split()
        return int(first), int(second)

    def tell(self, *words: object) -> tuple[int, int]:
        """One command; its answer."""
        assert self._child.stdin is not None
        self._child.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        return self._answer()

    def sys(self, name: str, *args: int) -> int:
        """A system call by name; asserts that it did not fail."""
        result, _ = self.tell("sys", NR[name], *(a & (1 << 64) - 1 for a in args))
        assert result >= 0, f"{name}{args}: errno {-result}"
        return result

    def mmap(
        self, pages: int, prot: int = RW, flags: int = MAP_PRIVATE | MAP_ANON, *, at: int = 0, fd: int = -1,
        offset: int = 0,
    ) -> int:  # fmt: skip
        """mmap(2); with `at`, MAP_FIXED."""
        return self.sys("mmap", at, pages * PAGE, prot, flags | (MAP_FIXED if at else 0), fd, offset)

    def island(self, pages: int, prot: int = RW, flags: int = MAP_PRIVATE | MAP_ANON) -> int:
        """As mmap, with unmapped space on both sides, so that it merges with nothing."""
        base = self.mmap(pages + 2, PROT_NONE)
        self.sys("munmap", base, (pages + 2) * PAGE)
        return self.mmap(pages, prot, flags, at=base + PAGE)

    def write(self, addr: int, pages: int = 1, value: int = 7) -> None:
        """Store a byte in each page."""
        self.tell("write", addr, pages * PAGE, PAGE, value)

    def read(self, addr: int, pages: int = 1) -> int:
        """Load a byte of each page; their sum."""
        return self.tell("read", addr, pages * PAGE, PAGE)[0]

    def madvise(self, addr: int, pages: int, advice: str) -> None:
        """madvise(2)."""
        self.sys("madvise", addr, pages * PAGE, MADV[advice])

    def page_out(self, addr: int, pages: int) -> None:
        """MADV_PAGEOUT until all pages are in swap (or two seconds have passed: the caller counts).

        A page that still lies in a CPU's LRU batch cannot be isolated (folio_isolate_lru); the next call gets it.
        """
        for _ in range(40):
            self.sys("madvise", addr, pages * PAGE, 21)
            if raw.bits(self.pid, addr, pages, raw.SWAPPED) == pages:
                return
            time.sleep(0.05)

    def fork(self) -> int:
        """Fork; from now on the child answers, until `back`."""
        self.pid = self.tell("fork")[0]
        return self.pid

    def back(self) -> None:
        """End the forked child; the parent answers again."""
        self.tell("back")

    def close(self) -> None:
        """Kill it."""
        self._child.kill()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
