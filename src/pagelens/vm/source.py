"""PageSource: whatever can hand out page contents (a process, a checkpoint, a file, the model)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from pagelens.vm.pages import PageRuns


@runtime_checkable
class PageSource(Protocol):
    """Contents and state of pages by address. Pagers take any of these."""

    def runs(self) -> PageRuns:
        """Which pages it has: PRESENT pages have contents, ZERO pages are zeros, others are holes."""
        ...

    def read(self, addr: int, length: int) -> bytes:
        """`length` bytes from `addr`. Raises KeyError for an address that it does not hold."""
        ...
