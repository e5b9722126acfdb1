"""A vma and the list of an address space.

`VmaList` is struct-of-arrays where it must be searched (numpy start and end), objects at the edge.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import overload

import numpy as np
import numpy.typing as npt

from pagelens.vm.units import PAGE_SHIFT, AddrRange


class Prot(enum.IntFlag):
    """Access rights of a vma, with the values of PROT_READ, PROT_WRITE and PROT_EXEC."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


@dataclass(frozen=True, slots=True)
class Vma:
    """One line of /proc/PID/maps.

    start, end: bytes, [start, end). offset: bytes into the file. dev: "MM:mm" in hex as maps prints it.
    name: the path, or [heap], [stack], [vdso], "[anon:NAME]", or "". vm_flags: two-letter codes of
    VmFlags in smaps (fs/proc/task_mmu.c, show_smap_vma_flags), or None when not read.
    """

    start: int
    end: int
    prot: Prot
    shared: bool = False
    offset: int = 0
    dev: str = "00:00"
    inode: int = 0
    name: str = ""
    vm_flags: frozenset[str] | None = None

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def pages(self) -> int:
        """Length in 4 KiB pages."""
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def range(self) -> AddrRange:
        """The address range."""
        return AddrRange(self.start, self.end)

    @property
    def is_anon(self) -> bool:
        """Whether no file stands behind it (shared anonymous memory has one: a shmem inode)."""
        return self.inode == 0 and not self.shared

    @property
    def perms(self) -> str:
        """As in maps: "rw-p"."""
        return (
            ("r" if self.prot & Prot.READ else "-")
            + ("w" if self.prot & Prot.WRITE else "-")
            + ("x" if self.prot & Prot.EXEC else "-")
            + ("s" if self.shared else "p")
        )

    @staticmethod
    def parse_perms(perms: str) -> tuple[Prot, bool]:
        """(rights, shared) of "rw-p"."""
        prot = Prot.NONE
        for letter, bit in (("r", Prot.READ), ("w", Prot.WRITE), ("x", Prot.EXEC)):
            if letter in perms:
                prot |= bit
        return prot, perms.endswith("s")

    def replaced(self, **changes: object) -> Vma:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.start:012x}-{self.end:012x} {self.perms} {self.name or 'anon'}"


class VmaList(Sequence[Vma]):
    """The vmas of one address space, sorted by address, without overlap."""

    def __init__(self, vmas: Iterable[Vma] = ()) -> None:
        self._vmas: tuple[Vma, ...] = tuple(sorted(vmas, key=attrgetter("start")))

    @cached_property
    def starts(self) -> npt.NDArray[np.uint64]:
        """First address of each vma."""
        return np.array([v.start for v in self._vmas], dtype=np.uint64)

    @cached_property
    def ends(self) -> npt.NDArray[np.uint64]:
        """Address behind each vma."""
        return np.array([v.end for v in self._vmas], dtype=np.uint64)

    def find(self, addr: int) -> Vma | None:
        """The vma that holds addr, or None (unlike the kernel's find_vma, which may return the next one)."""
        index = int(np.searchsorted(self.starts, np.uint64(addr), side="right")) - 1
        if index >= 0 and addr < self._vmas[index].end:
            return self._vmas[index]
        return None

    def find_many(self, addrs: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Index of the vma of each address, -1 where unmapped. Shape as given."""
        if not self._vmas:
            return np.full(addrs.shape, -1, dtype=np.int64)
        index = np.searchsorted(self.starts, addrs, side="right").astype(np.int64) - 1
        inside = (index >= 0) & (addrs < self.ends[np.maximum(index, 0)])
        return np.where(inside, index, -1)

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """All vmas that share a byte with [start, end)."""
        return [v for v in self._vmas if v.start < end and v.end > start]

    @property
    def pages(self) -> int:
        """Mapped pages in all."""
        return int((self.ends - self.starts).sum()) >> PAGE_SHIFT

    @overload
    def __getitem__(self, index: int) -> Vma: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Vma]: ...
    def __getitem__(self, index: int | slice) -> Vma | Sequence[Vma]:
        return self._vmas[index]

    def __len__(self) -> int:
        return len(self._vmas)

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._vmas)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VmaList) and self._vmas == other._vmas

    def __hash__(self) -> int:
        return hash(self._vmas)
