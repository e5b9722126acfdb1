"""Addresses, pages and ranges. x86-64, 4 KiB pages (DESIGN: `doctor` says so elsewhere)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pagelens.vm.errors import UsageError

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
HPAGE_SIZE = 2 << 20  # one PMD
HPAGE_PAGES = HPAGE_SIZE // PAGE_SIZE
# The end of user space (TASK_SIZE_MAX, arch/x86/include/asm/page_64_types.h): with four levels of page tables, and with
# five, where mmap goes beyond the first (DEFAULT_MAP_WINDOW) only if its hint does.
TASK_SIZE = 0x7FFF_FFFF_F000
TASK_SIZE_LA57 = 0xFF_FFFF_FFFF_F000

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?$", re.IGNORECASE)
_HEX = re.compile(r"^0[xX][0-9a-fA-F]+$")
_SCALE = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def task_size(levels: int) -> int:
    """The first address behind user space, where page tables have `levels` (4 or 5)."""
    return TASK_SIZE_LA57 if levels == 5 else TASK_SIZE


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "page"), counted(1200, "page")
    ('1 page', '1,200 pages')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def page_down(addr: int) -> int:
    """Round an address down to its page."""
    return addr & ~(PAGE_SIZE - 1)


def page_up(addr: int) -> int:
    """Round an address up to the next page boundary."""
    return (addr + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def parse_size(text: str) -> int:
    """Bytes of "64k", "1.5G", "4096", "0x1000". Powers of two.

    >>> parse_size("64k")
    65536
    """
    if _HEX.match(text.strip()):
        return int(text, 16)
    match = _SIZE.match(text.strip())
    if not match:
        raise UsageError(f"not a size: {text!r} (examples: 4096, 64k, 1.5G)")
    return int(float(match.group(1)) * _SCALE[match.group(2).lower()])


def format_size(size: float) -> str:
    """Bytes for people: "4 KiB", "1.5 MiB". Exact figures belong in the machine formats."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@dataclass(frozen=True, slots=True, order=True)
class AddrRange:
    """[start, end) in bytes, both page-aligned."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if self.start % PAGE_SIZE or self.end % PAGE_SIZE:
            raise UsageError(f"range {self.start:#x}-{self.end:#x} is not page-aligned")
        if self.end <= self.start:
            raise UsageError(f"range {self.start:#x}-{self.end:#x} is empty or reversed")

    @property
    def pages(self) -> int:
        """Number of 4 KiB pages."""
        return (self.end - self.start) >> PAGE_SHIFT

    def __contains__(self, addr: int) -> bool:
        return self.start <= addr < self.end

    def overlap(self, other: AddrRange) -> AddrRange | None:
        """The common part, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return AddrRange(start, end) if start < end else None

    @classmethod
    def parse(cls, text: str) -> AddrRange:
        """ "START-END" or "START+SIZE": addresses hexadecimal, with or without 0x, a size as parse_size takes it.
        Kernel addresses are refused."""
        sep = "+" if "+" in text else "-"
        first, found, second = text.partition(sep)
        try:
            start = int(first, 16)
            end = start + parse_size(second) if sep == "+" else int(second, 16)
        except ValueError:
            found = ""
            start = end = 0
        if not found:
            raise UsageError(f"not a range: {text!r} (examples: 7f0000000000-7f0000001000, 7f0000000000+64k)")
        if end > TASK_SIZE_LA57 + PAGE_SIZE:
            raise UsageError(
                f"range {text} reaches into kernel addresses; user space ends at {TASK_SIZE_LA57:#x} or before"
            )
        return cls(page_down(start), page_up(end))

    def __str__(self) -> str:
        return f"{self.start:012x}-{self.end:012x}"


def ranges_text(words: Sequence[int]) -> str:
    """Address and length by turns, as text.

    >>> ranges_text([0x1000, 16, 0x3000, 8])
    '0x1000+16 0x3000+8'
    """
    return " ".join(f"{start:#x}+{length}" for start, length in zip(words[::2], words[1::2], strict=True))


def ranges_of(text: str) -> list[tuple[int, int]]:
    """(address, length) of each range that `ranges_text` wrote; of any other text none.

    >>> ranges_of("0x1000+16 0x3000+8"), ranges_of("data")
    ([(4096, 16), (12288, 8)], [])
    """
    pairs = [word.partition("+") for word in text.split()]
    return [(int(a, 16), int(n)) for a, _, n in pairs if a.startswith("0x") and n.isdigit()]
