"""The files of a random program: memfds and files on disk, made, cut, written and punched."""

from __future__ import annotations

import random
from collections.abc import Callable

from pagelens.model.op import Op
from pagelens.vm.units import PAGE_SIZE

MAKES = frozenset({"memfd", "disk"})
CHANGES = frozenset({"ftruncate", "pwrite", "fallocate"})
_MOST = 4


class Files:
    """sizes: pages of each by name. disks: those that lie on disk. All of such a file stays in the page cache, because
    what a read ahead brings in is not for the model to say: it only shrinks, or grows page by page at its end."""

    def __init__(self, rng: random.Random, name: Callable[[str], str]) -> None:
        self._random, self._name = rng, name
        self.sizes: dict[str, int] = {}
        self.disks: list[str] = []

    def make(self, name: str, proc: str) -> Op | None:
        """A new one; None where there are enough."""
        if len(self.sizes) >= _MOST:
            return None
        size = self._random.choice((0, 1, 4, 16, 32, 48))
        result = self._name("f")
        self.sizes[result] = size
        if name == "disk":
            self.disks.append(result)
        return Op(name, proc, result, length=size * PAGE_SIZE)

    def change(self, name: str, proc: str) -> Op | None:
        """Another size, or other contents; None where there is no file for it."""
        r = self._random
        if not self.sizes:
            return None
        file = r.choice(list(self.sizes))
        size, disk = self.sizes[file], file in self.disks
        if name == "ftruncate":
            more = r.choice((-8, -2, -1, 0, 1, 4, 16))
            size = self.sizes[file] = max(0, size - abs(more) if disk else size + more)
            return Op(name, proc, length=size * PAGE_SIZE, file=file)
        first, count = r.randint(0, size if disk else max(size, 1)), r.randint(1, 8)
        if name == "pwrite":
            self.sizes[file] = max(size, first + count)
            return Op(name, proc, length=count * PAGE_SIZE, file=file, offset=first * PAGE_SIZE)
        if disk:
            return None
        flags = r.choice((0, 1, 3, 3))
        if not flags:
            self.sizes[file] = max(size, first + count)
        return Op(name, proc, length=count * PAGE_SIZE, flags=flags, file=file, offset=first * PAGE_SIZE)
