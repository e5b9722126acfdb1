"""What a short sequence of operations is made with (`proof.recipes`): the program so far, and names for new things."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pagelens.model import op as ops
from pagelens.model.op import ARENA_BASE, ARENA_PAGES, Op, Place
from pagelens.model.world import Names
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import VmaList

ANON = ops.PRIVATE | ops.ANONYMOUS | ops.FIXED
FAR_TABLES = 0x2000_0000_0000  # table-aligned, where nothing else lies


@dataclass(slots=True)
class Ground:
    """What a recipe needs of the generator. locks: whether this program may lock memory. room: for another process.
    files: names that are mapped; disks: those of them that lie on disk, with their pages. calm: no limit is set, so
    that execve finds the memory that it needs. harness: pages that are mapped and not the program's."""

    random: random.Random
    proc: str
    vmas: VmaList
    place: Callable[[int, Names], Place]
    name: Callable[[str], str]
    names: Names
    locks: bool
    room: bool = False
    calm: bool = True
    files: tuple[str, ...] = ()
    disks: Mapping[str, int] = field(default_factory=dict)
    harness: int = 0

    def at(self, addr: int) -> Place:
        """An address as a program names it."""
        return self.place(addr, self.names)

    def map(self, addr: int, pages: int, prot: int = 3, flags: int = ANON) -> Op:
        """mmap at a fixed address."""
        return Op("mmap", self.proc, self.name("m"), self.at(addr), pages * PAGE_SIZE, prot, flags)

    def on(self, name: str, addr: int, pages: int, *, prot: int = 0, flags: int = 0) -> Op:
        """An operation on a range."""
        return Op(name, self.proc, place=self.at(addr), length=pages * PAGE_SIZE, prot=prot, flags=flags)

    def move(self, addr: int, pages: int, target: int, flags: int) -> Op:
        """mremap without change of size."""
        size = pages * PAGE_SIZE
        return Op("mremap", self.proc, self.name("m"), self.at(addr), size, 0, flags, self.at(target), size)

    def spot(self, pages: int) -> int:
        """An address of the arena with room for `pages`."""
        return ARENA_BASE + self.random.randrange(ARENA_PAGES - pages) * PAGE_SIZE
