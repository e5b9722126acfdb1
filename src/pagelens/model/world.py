"""What a world is in which a program of operations runs: the model (`model.runner`) or a real process
(`proof.oracle`). Both start from the same setting and give the same answers, or one of them is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagelens.model.op import Op, Outcome, Place
from pagelens.vm.accounting import Accounting
from pagelens.vm.units import PAGE_SIZE, TASK_SIZE, page_up
from pagelens.vm.vma import VmaList

U64 = npt.NDArray[np.uint64]
Key = tuple[int, int, int, bool, int, str]
Span = tuple[int, int]
_ADDRESS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Setting:
    """Where things lie in the child, in bytes: its text (from its file), the region of its stacks, where brk
    starts, below which address mmap places (mm->mmap_base); and what it may do. The defaults are those of
    native/oracle/oracle.c without randomisation and with an 8 MiB stack limit; the oracle measures its own."""

    text: int = 0x1000_0000
    text_pages: int = 1
    region: int = 0x2000_0000
    region_pages: int = 128
    brk: int = 0x1000_1000
    data_bytes: int = (
        0  # of its file's data segment (end_data - start_data): brk counts them against RLIMIT_DATA
    )
    mmap_base: int = TASK_SIZE - 0x800_0000
    levels: int = 4  # of page tables; with five, user space goes to 2^56
    start_stack: int = 0  # of what exec made: maps names [stack] whatever lies there now; 0: unknown
    memlock: int = 8 << 20  # RLIMIT_MEMLOCK
    stack: int = 8 << 20  # RLIMIT_STACK, RLIMIT_DATA, RLIMIT_AS
    data: int = 1 << 63
    address_space: int = 1 << 63
    ipc_lock: bool = True  # CAP_IPC_LOCK: the limit does not hold
    max_map_count: int = 65530
    memory_pages: int = 1 << 30  # MemTotal: a larger private mapping is refused (overcommit_memory 0)
    dac_min_addr: int = 0x1_0000  # vm.mmap_min_addr: below it CAP_SYS_RAWIO is needed
    overcommit: int = 0  # vm.overcommit_memory; 2 depends on what else runs, see docs/fidelity.md
    peak: int = 0  # VmPeak when the program starts, in bytes; 0: what the harness has
    disk_aligns: bool = False  # its files on disk are mapped at multiples of 2 MiB (thp_get_unmapped_area)
    rss_exact: bool = True  # status sums the counters exactly (6.2); before, each task keeps up to 64 back

    @property
    def harness(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """[(start, end)] of the mappings that are not the program's."""
        return (
            (self.text, self.text + self.text_pages * PAGE_SIZE),
            (self.region, self.region + self.region_pages * PAGE_SIZE),
        )


@dataclass(slots=True)
class Names:
    """What the names of a program mean in one world: regions by address (bytes)."""

    regions: dict[str, int] = field(default_factory=dict)

    def resolve(self, place: Place) -> int:
        """The address. KeyError where the region does not exist (its mmap failed)."""
        base = self.regions[place.region] if place.region else 0
        return (base + place.offset) & _ADDRESS

    def learn(self, op: Op, result: int) -> None:
        """Keep what `op` gave, if it succeeded."""
        if op.result and op.name in ("mmap", "mremap", "shmat"):
            if result >= 0:
                self.regions[op.result] = result
            else:
                self.regions.pop(op.result, None)


class Descriptors:
    """Which files each process and thread has open. Those made by fork, vfork and thread share one table (the
    oracle's children have CLONE_FILES); execve gives its caller a copy. And how large those on disk are, in bytes."""

    def __init__(self) -> None:
        self._tables: dict[str, set[str]] = {"main": set()}
        self._disks: dict[str, int] = {}

    def has(self, op: Op) -> bool:
        """Whether the process of `op` has the file that it names, if any."""
        return not op.file or op.file in self._tables[op.proc]

    def leaves_hole(self, op: Op) -> bool:
        """Whether `op` would leave pages of a file on disk out of the page cache: what a later fault then reads ahead
        is not for the model to say. Such an operation is left out, in every world alike."""
        size = self._disks.get(op.file)
        if size is None:
            return False
        return (
            (op.name == "ftruncate" and op.length > size)
            or (op.name == "pwrite" and op.offset > size)
            or op.name == "fallocate"
        )

    def done(self, op: Op) -> None:
        """Keep what `op`, which succeeded, did to the tables and the sizes."""
        if op.file in self._disks:
            if op.name == "ftruncate":
                self._disks[op.file] = op.length
            elif op.name == "pwrite":
                self._disks[op.file] = max(self._disks[op.file], op.offset + op.length)
        if op.name == "disk":
            self._disks[op.result] = op.length
        if op.name in ("memfd", "disk"):
            self._tables[op.proc].add(op.result)
        elif op.name in ("fork", "vfork", "thread"):
            self._tables[op.result] = self._tables[op.proc]
        elif op.name == "execve":
            self._tables[op.proc] = set(self._tables[op.proc])


def undefined(op: Op, names: Names) -> bool:
    """Whether `op` speaks of a region that does not exist; then it is left out, in every world alike."""
    return any(
        place is not None and place.region and place.region not in names.regions
        for place in (op.place, op.new_place)
    )


def unmaps_harness(op: Op, names: Names, setting: Setting) -> bool:
    """Whether `op` is an mremap whose absurd lengths wrap to below its start, and onto what is not the program's (to
    6.16: do_munmap of [addr + new_len, addr + old_len)); then it is left out, in every world alike."""
    if op.name != "mremap" or op.place is None or op.length <= op.new_length:
        return False
    start = names.resolve(op.place) + page_up(op.new_length) & _ADDRESS
    end = start + page_up(op.length) - page_up(op.new_length)
    return any(start < high and low < end for low, high in setting.harness)


class World(Protocol):
    """Processes of one program, by name."""

    setting: Setting
    names: Names

    def apply(self, op: Op) -> Outcome | None:
        """Do one operation; None where it was left out."""
        ...

    def alive(self) -> Iterable[str]:
        """Names of the processes and threads that exist."""
        ...

    def is_leader(self, proc: str) -> bool:
        """Whether `proc` is a process, not a second thread of one."""
        ...

    def vmas(self, proc: str) -> VmaList:
        """The vmas of the program: without the harness."""
        ...

    def keys(self, proc: str) -> list[Key]:
        """What maps says of the vmas of the program: (start, end, rights, shared, offset, name) of each, by
        address. The same list object as long as nothing of it changes."""
        ...

    def pagemap(self, proc: str, start: int, npages: int) -> U64:
        """uint64[npages] as /proc/PID/pagemap."""
        ...

    def pages(self, proc: str, spans: Sequence[Span]) -> U64:
        """The pagemap of several spans (address, pages), one after the other. The caller may change it."""
        ...

    def kpage(self, frames: U64) -> tuple[U64, U64]:
        """(kpagecount, kpageflags) of frames, by the numbers that `pages` gives in its low 55 bits."""
        ...

    def status(self, proc: str) -> dict[str, int]:
        """Memory fields of status, in bytes."""
        ...

    def statm(self, proc: str) -> tuple[int, ...]:
        """/proc/PID/statm: size, resident, shared, text, 0, data, 0, in pages."""
        ...

    def rollup(self, proc: str) -> dict[str, int]:
        """smaps_rollup, in bytes, harness included; shares of pages (Pss…) only where they can be compared."""
        ...

    def accounting(self, proc: str) -> tuple[VmaList, Accounting]:
        """The vmas with VmFlags, harness included; smaps fields of each, and status."""
        ...
