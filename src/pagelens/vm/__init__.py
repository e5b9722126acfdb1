"""The vocabulary: typed values of address spaces, without I/O.

`linux` (the live kernel) and `model` (the executable model) both produce these values, and nothing
above them can tell which of the two it looks at. Names load on first use, so that raising an error (or
`pagelens --help`) does not cost the import of numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "Accounting": "pagelens.vm.accounting",
    "AddrRange": "pagelens.vm.units",
    "CapabilityMissingError": "pagelens.vm.errors",
    "DamagedInputError": "pagelens.vm.errors",
    "HPAGE_PAGES": "pagelens.vm.units",
    "HPAGE_SIZE": "pagelens.vm.units",
    "PAGE_SHIFT": "pagelens.vm.units",
    "PAGE_SIZE": "pagelens.vm.units",
    "PageRuns": "pagelens.vm.pages",
    "PageSource": "pagelens.vm.source",
    "PageState": "pagelens.vm.pages",
    "PagelensError": "pagelens.vm.errors",
    "Prot": "pagelens.vm.vma",
    "Snapshot": "pagelens.vm.snapshot",
    "TargetGoneError": "pagelens.vm.errors",
    "UsageError": "pagelens.vm.errors",
    "Vma": "pagelens.vm.vma",
    "VmaList": "pagelens.vm.vma",
}

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


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pagelens.vm' has no attribute {name!r}")
