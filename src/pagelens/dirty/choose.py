"""Which backend: by name, or `auto`, which tries what works here (probing, never the kernel's version).

Order of `auto`: pagescan (exact, cheap, any process), then soft-dirty (any process, needs the kernel option,
resets the whole process), then for named ranges of this process the mprotect barrier (works everywhere).
uffd-sync is never chosen: it makes each first write wait for a thread, and is for who wants address, thread
and time of each. A backend's module is imported when it is asked for (start-up time).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pagelens.dirty.epoch import Backend, Semantics
from pagelens.dirty.spans import Spans
from pagelens.linux import inject, pagescan
from pagelens.linux.pagescan import Category
from pagelens.linux.procfs import Process
from pagelens.linux.userfault import Feature, Userfault, available
from pagelens.vm.errors import CapabilityMissingError, UsageError

Maker = Callable[[Process, Spans | None, bool, bool], Backend]


def _pagescan(proc: Process, ranges: Spans | None, keep_huge: bool, traced: bool) -> Backend:
    from pagelens.dirty.pagescan import Pagescan

    why = pagescan_missing()
    if why:
        raise CapabilityMissingError(why, capability="uffd-wp-async", fix="boot Linux 6.7 or later")
    if proc.pid == os.getpid():
        uffd = Userfault.create(Feature.WP_ASYNC | Feature.WP_UNPOPULATED)
        return Pagescan(proc, uffd, ranges=ranges, keep_huge=keep_huge, handshake=False)
    uffd, _ = inject.take_userfaultfd(proc, traced=traced)
    try:
        return Pagescan(proc, uffd, ranges=ranges, keep_huge=keep_huge)
    except BaseException:
        uffd.close()
        raise


def pagescan_missing() -> str:
    """Why pagescan cannot work on this kernel, or "" where it can."""
    if Category.WRITTEN not in pagescan.supported():
        return "this kernel has no PAGEMAP_SCAN"
    features = available()
    if Feature.WP_ASYNC not in features:
        return "userfaultfd is not available" if not features else "this kernel's userfaultfd has no WP_ASYNC"
    return ""


def _soft_dirty(proc: Process, ranges: Spans | None, keep_huge: bool, traced: bool) -> Backend:  # noqa: ARG001 (one signature for all)
    from pagelens.dirty.soft_dirty import SoftDirty, require_soft_dirty

    require_soft_dirty()
    return SoftDirty(proc, ranges=ranges, hold=not traced)


def _all(proc: Process, ranges: Spans | None, keep_huge: bool, traced: bool) -> Backend:
    if proc.pid == os.getpid():
        raise UsageError("--backend all holds the target still, which a process cannot do to itself")
    from pagelens.dirty.compare import All
    from pagelens.dirty.pagescan import Pagescan
    from pagelens.dirty.soft_dirty import SoftDirty, require_soft_dirty

    require_soft_dirty()
    scan = _pagescan(proc, ranges, keep_huge, traced)
    assert isinstance(scan, Pagescan)
    return All(proc, scan, SoftDirty(proc, ranges=ranges), hold=not traced)


def _mprotect(proc: Process, ranges: Spans | None, keep_huge: bool, traced: bool) -> Backend:  # noqa: ARG001 (one signature for all)
    from pagelens.dirty.mprotect import Mprotect

    return Mprotect(proc, ranges=ranges)


def _uffd_sync(proc: Process, ranges: Spans | None, keep_huge: bool, traced: bool) -> Backend:  # noqa: ARG001 (one signature for all)
    from pagelens.dirty.uffd_sync import UffdSync

    return UffdSync(proc, ranges=ranges)


_MAKERS: dict[str, Maker] = {
    "pagescan": _pagescan,
    "soft-dirty": _soft_dirty,
    "mprotect": _mprotect,
    "uffd-sync": _uffd_sync,
    "all": _all,
}
BACKENDS = ("auto", *_MAKERS)


def semantics() -> dict[str, Semantics]:
    """What each backend promises."""
    from pagelens.dirty.compare import All
    from pagelens.dirty.mprotect import Mprotect
    from pagelens.dirty.pagescan import Pagescan
    from pagelens.dirty.soft_dirty import SoftDirty
    from pagelens.dirty.uffd_sync import UffdSync

    kinds = (Pagescan, SoftDirty, Mprotect, UffdSync, All)
    return {kind.semantics.name: kind.semantics for kind in kinds}


def auto(*, own_ranges: bool = False) -> str:
    """The backend that `auto` means here, by trying. own_ranges: named ranges of this process, which mprotect
    can watch on any kernel. Raises CapabilityMissingError where none works."""
    missing = pagescan_missing()
    if not missing:
        return "pagescan"
    from pagelens.dirty.soft_dirty import require_soft_dirty

    try:
        require_soft_dirty()
    except CapabilityMissingError as error:
        if own_ranges:
            return "mprotect"
        raise CapabilityMissingError(
            f"no backend works here: pagescan: {missing}; {error}", capability="uffd-wp-async"
        ) from None
    return "soft-dirty"


def make_backend(
    name: str, proc: Process, *, ranges: Spans | None = None, keep_huge: bool = False, traced: bool = False
) -> Backend:
    """A backend for `proc`, not armed yet. traced: the calling thread traces it and holds its
    leader in a stop. Raises UsageError for a name that does not exist."""
    if name == "auto":
        name = auto(own_ranges=ranges is not None and proc.pid == os.getpid())
    if name not in _MAKERS:
        raise UsageError(f"no backend {name!r} (there are: {', '.join(BACKENDS)})")
    return _MAKERS[name](proc, ranges, keep_huge, traced)
