"""Short names for the tests of the model."""

from __future__ import annotations

import numpy as np

from pagelens.model import Machine, Process

PAGE = 4096
R, RW, RX, NONE = 1, 3, 5, 0
PRIV, SHARED, FIXED = 0x22, 0x21, 0x32  # anonymous
BASE = 0x1000_0000_0000
PROFILES = ("linux-6.1", "linux-6.12", "linux-6.18", "linux-7.2")


def process(profile: str = "linux-6.18", **rules: bool) -> Process:
    """A process of a fresh machine."""
    machine = Machine(profile)
    if rules:
        machine = Machine(machine.profile.with_rules(**rules))
    return machine.spawn()


def anon(p: Process, pages: int, prot: int = RW, at: int = 0, page: int | None = None, flags: int = 0) -> int:
    """mmap of private anonymous memory; page: fixed at BASE + page."""
    if page is not None:
        at, flags = BASE + page * PAGE, flags | 0x10
    addr = p.mmap(at, pages * PAGE, prot, 0x22 | flags)
    assert addr > 0, addr
    return addr


def maps(p: Process, base: int = BASE) -> list[tuple[int, int, str]]:
    """[(first page from base, pages, permissions)] of the vmas from base on."""
    return [
        ((v.start - base) // PAGE, v.pages, v.perms) for v in p.snapshot(pages=False).vmas if v.start >= base
    ]


def bits(p: Process, addr: int, pages: int, bit: int) -> int:
    """How many of the pages have that bit of pagemap."""
    return int(((p.pagemap(addr, pages) >> np.uint64(bit)) & np.uint64(1)).sum())


def smaps(p: Process, addr: int) -> dict[str, int]:
    """The smaps fields, in KiB, of the vma that holds addr."""
    snapshot = p.snapshot()
    assert snapshot.accounting is not None and snapshot.accounting.per_vma is not None
    for vma, row in zip(snapshot.vmas, snapshot.accounting.per_vma.tolist(), strict=True):
        if vma.start <= addr < vma.end:
            return {k: v // 1024 for k, v in zip(snapshot.accounting.fields, row, strict=True)}
    raise KeyError(hex(addr))
