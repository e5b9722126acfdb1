"""What random programs are made of: operations and advice with their weights, rights, limits and odd values."""

from __future__ import annotations

from dataclasses import dataclass, field

# Raised when the same seed gives another program, so that a recorded seed says what it is a seed of.
GENERATOR = 9
PROTS = (3,) * 12 + (1,) * 4 + (0,) * 2 + (7,) * 2 + (5, 2, 4, 6)
# Advice with its weight. Without pageout: which pages reclaim can isolate is its own affair (docs/fidelity.md).
ADVICE = {
    "dontneed": 8,
    "free": 4,
    "populate_read": 6,
    "populate_write": 4,
    "dontfork": 2,
    "dofork": 2,
    "wipeonfork": 2,
    "keeponfork": 2,
    "mergeable": 6,
    "unmergeable": 1,
    "hugepage": 2,
    "nohugepage": 2,
    "dontdump": 1,
    "dodump": 1,
    "random": 1,
    "sequential": 1,
    "normal": 2,
    "willneed": 1,
    "cold": 1,
    "dontneed_locked": 2,
    "guard_install": 9,
    "guard_remove": 2,
    "remove": 1,
}
WEIGHTS = {
    "mmap": 18,
    "munmap": 7,
    "mprotect": 12,
    "mremap": 9,
    "madvise": 10,
    "write": 20,
    "read": 14,
    "exec": 2,
    "brk": 4,
    "mlock": 2,
    "mlock2": 1,
    "munlock": 2,
    "mlockall": 0.3,
    "munlockall": 0.5,
    "msync": 2,
    "fork": 1.5,
    "execve": 0.5,
    "exit": 1.5,
    "thread": 0.5,
    "memfd": 0.5,
    "disk": 0.3,
    "ftruncate": 0.6,
    "pwrite": 1,
    "fallocate": 0.8,
    "clear_refs": 0.6,
    "shmat": 1.2,
    "peek": 0.7,
    "poke": 0.7,
    "rlimit": 0.4,
    "uncap": 0.05,
}
LOCKING = frozenset({"mlock", "mlock2", "munlock", "mlockall", "munlockall"})
# Limits in pages; None: none. Tight ones are lifted soon (`Generator._rlimit`), so that most operations succeed.
LIMITS = {
    "as": (250, 500, 1000, None),
    "data": (30, 100, 300, None),
    "stack": (4, 20, 2048),
    "memlock": (0, 8, 64),
}
_FAR = (0, 0xF000, 0x7FFF_FFFF_E000, 0x7FFF_FFFF_F000, 1 << 47, 1 << 63, (1 << 64) - 4096)


def huge(levels: int) -> tuple[int, ...]:
    """Lengths whose end overflows or lies beyond user space: each must be refused with the right error."""
    space = 1 << (56 if levels == 5 else 47)
    return (space, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 4095, (1 << 64) - 1)


def far(levels: int) -> tuple[int, ...]:
    """Addresses at the ends of user space, and beyond."""
    return (*_FAR, (1 << 56) - 8192, (1 << 56) - 4096, 1 << 56) if levels == 5 else _FAR


@dataclass(frozen=True, slots=True)
class Mix:
    """What a program is made of. processes: at most so many at once. without: operations or advice left out
    (what this kernel or this user cannot do); "exec_only" leaves out mappings that may only be executed.
    weights: overrides."""

    processes: int = 3
    without: frozenset[str] = frozenset()
    weights: dict[str, float] = field(default_factory=dict)
