"""Mm: one address space (mm_struct): areas, page tables, counters and limits.

The functions that change it stand in their own modules, one a kernel file (`mapping`, `merge`, `protect`,
`remap`, `advice`, `lock`, `fault`, `fork`); this module holds the state and the tests that all of them make
(may_expand_vm, __vm_enough_memory, mlock_future_ok).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pagelens.model.abi import (
    EINVAL,
    ENOMEM,
    PAGE,
    SHIFT,
    VM_EXEC,
    VM_GROWSDOWN,
    VM_LOCKED,
    VM_MAYBE_GUARD,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
)
from pagelens.model.area import AreaTree
from pagelens.model.files import File
from pagelens.model.tables import PageTables
from pagelens.vm.units import task_size

if TYPE_CHECKING:
    from pagelens.model.machine import Machine

UNLIMITED = 1 << 63


@dataclass(slots=True)
class Limits:
    """Resource limits in bytes, and privileges that lift them."""

    address_space: int = UNLIMITED  # RLIMIT_AS
    data: int = UNLIMITED  # RLIMIT_DATA
    stack: int = 8 << 20  # RLIMIT_STACK
    memlock: int = 8 << 20  # RLIMIT_MEMLOCK
    cap_ipc_lock: bool = True
    cap_sys_admin: bool = True
    cap_sys_rawio: bool = True

    def set(self, resource: int, limit: int) -> int:
        """A soft limit by its number (include/uapi/asm-generic/resource.h): 0, or -EINVAL for one that paging
        does not know."""
        names = {2: "data", 3: "stack", 8: "memlock", 9: "address_space"}
        if resource not in names:
            return EINVAL
        setattr(self, names[resource], min(limit, UNLIMITED))
        return 0


@dataclass(slots=True)
class InitialArea:
    """An area that exists when the process starts (a line of maps). populated: its pages are present."""

    start: int
    end: int
    vm_flags: int
    pgoff: int = 0
    file: File | None = None
    name: str = ""
    populated: bool = False
    has_anon_vma: bool = False


@dataclass(slots=True)
class Layout:
    """What exec leaves behind. mmap_base: where top-down placement starts; brk: end of the heap; levels: of page
    tables, 4 or 5; task_size: the end of user space (0: what the levels give)."""

    mmap_base: int = 0x7FFF_F7FF_F000
    mmap_legacy_base: int = 0x2AAA_AAAA_A000
    start_brk: int = 0x55_5555_5000
    brk: int = 0
    start_data: int = 0
    end_data: int = 0
    start_stack: int = 0
    task_size: int = 0
    start_code: int = 0
    end_code: int = 0
    levels: int = 4
    areas: list[InitialArea] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task_size = self.task_size or task_size(self.levels)


class Mm:
    """An address space. rss counts pages: file, anon, shmem (MM_FILEPAGES, MM_ANONPAGES, MM_SHMEMPAGES)."""

    def __init__(self, machine: Machine, layout: Layout, limits: Limits | None = None) -> None:
        self.machine = machine
        self.profile = machine.profile
        # Flags that need not match for a merge: VM_SOFTDIRTY, later all of VMA_STICKY_FLAGS; and those that a
        # merged area has if any part had them.
        guard = VM_MAYBE_GUARD if self.profile.guard_vma_flag else 0
        self.merge_ignores = VM_SOFTDIRTY | guard
        self.sticky_flags = guard | (VM_SOFTDIRTY if self.profile.sticky_softdirty else 0)
        self.number = machine.next_mm()
        self.layout = layout
        self.limits = replace(limits) if limits else Limits()
        self.areas = AreaTree()
        self.tables = PageTables(layout.levels)
        self.total_vm = self.data_vm = self.exec_vm = self.stack_vm = self.locked_vm = 0
        self.rss_file = self.rss_anon = self.rss_shmem = 0
        self.hiwater_rss = self.hiwater_vm = 0
        self.start_brk = layout.start_brk
        self.brk = layout.brk or layout.start_brk
        self.def_flags = 0
        self.users = 1
        self.pid = 0
        self.parent: tuple[int, int] | None = None  # (mm number, fork event) that this one was copied from

    # -- counters and limits

    @property
    def map_count(self) -> int:
        return self.areas.count

    @property
    def rss(self) -> int:
        return self.rss_file + self.rss_anon + self.rss_shmem

    def stat_account(self, flags: int, pages: int) -> None:
        """vm_stat_account."""
        if pages < 0:  # update_hiwater_vm: only before something goes; VmPeak shows the larger of both
            self.hiwater_vm = max(self.hiwater_vm, self.total_vm)
        self.total_vm += pages
        if is_exec_mapping(flags):
            self.exec_vm += pages
        elif flags & VM_GROWSDOWN:
            self.stack_vm += pages
        elif is_data_mapping(flags):
            self.data_vm += pages

    def may_expand(self, flags: int, pages: int) -> bool:
        """may_expand_vm."""
        if self.total_vm + pages > self.limits.address_space >> SHIFT:
            return False
        return not (is_data_mapping(flags) and self.data_vm + pages > self.limits.data >> SHIFT)

    def charge(self, pages: int) -> int:
        """security_vm_enough_memory_mm: 0 and charged, or ENOMEM."""
        machine = self.machine
        if machine.overcommit == 1 or pages <= 0:
            machine.committed += pages
            return 0
        if machine.overcommit == 0:
            if pages > machine.memory_pages:
                return ENOMEM
            machine.committed += pages
            return 0
        allowed = machine.memory_pages * machine.overcommit_ratio // 100
        if not self.limits.cap_sys_admin:
            allowed -= machine.admin_reserve_pages
        allowed -= min(self.total_vm // 32, machine.user_reserve_pages)
        if machine.committed + pages < allowed:
            machine.committed += pages
            return 0
        return ENOMEM

    def uncharge(self, pages: int) -> None:
        """vm_unacct_memory."""
        self.machine.committed -= pages

    def mlock_future_ok(self, flags: int, size: int) -> bool:
        """mlock_future_ok: RLIMIT_MEMLOCK for a new locked mapping."""
        if not flags & VM_LOCKED or self.limits.cap_ipc_lock:
            return True
        return (size >> SHIFT) + self.locked_vm <= self.limits.memlock >> SHIFT

    @property
    def can_do_mlock(self) -> bool:
        return self.limits.memlock != 0 or self.limits.cap_ipc_lock

    # -- page-table helpers

    def next_floor_ceiling(self, start: int, end: int) -> tuple[int, int]:
        """End of the area below start, start of the area above end: what free_pgtables may touch."""
        before = self.areas.prev(start)
        above = self.areas.find(end)
        floor = before.end if before is not None else 0
        return floor, (above.start if above is not None else self.layout.task_size + PAGE)


def is_exec_mapping(flags: int) -> bool:
    """mm/internal.h."""
    return flags & (VM_EXEC | VM_WRITE | VM_GROWSDOWN) == VM_EXEC


def is_data_mapping(flags: int) -> bool:
    """mm/internal.h: private, writable, not a stack."""
    return flags & (VM_WRITE | VM_SHARED | VM_GROWSDOWN) == VM_WRITE
