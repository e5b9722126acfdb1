"""The vocabulary: typed values of address spaces, without I/O.

`linux` (the live kernel) and `model` (the executable model) both produce these values, and nothing
above them can tell which of the two it looks at.
"""

from pagelens.vm.accounting import Accounting
from pagelens.vm.errors import (
    CapabilityMissingError,
    DamagedInputError,
    PagelensError,
    TargetGoneError,
    UsageError,
)
from pagelens.vm.pages import PageRuns, PageState
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.source import PageSource
from pagelens.vm.units import HPAGE_PAGES, HPAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, AddrRange
from pagelens.vm.vma import Prot, Vma, VmaList

__all__ = [
    "HPAGE_PAGES",
    "HPAGE_SIZE",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "Accounting",
    "AddrRange",
    "CapabilityMissingError",
    "DamagedInputError",
    "PageRuns",
    "PageSource",
    "PageState",
    "PagelensError",
    "Prot",
    "Snapshot",
    "TargetGoneError",
    "UsageError",
    "Vma",
    "VmaList",
]
