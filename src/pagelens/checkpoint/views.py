"""Shared memory that one process maps more than once: each page of the object goes back once.

A JIT compiler, a browser or a Wayland client maps one memfd writable here and read-only, or executable, there. What the
process wrote through one view is to be seen through all, so a page is compared and written through one view only: the
first that is writable. Where none is, the page is written through the object's file, if that can be opened so
(`shared`). Pure: vma list and rows in, addresses out.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.image import U64, Kind, Rows
from pagelens.checkpoint.stored import Located
from pagelens.vm.pages import contained
from pagelens.vm.vma import Prot, Vma, VmaList

Key = tuple[str, int]  # device as maps prints it, inode


@dataclass(frozen=True, slots=True)
class View:
    """[start, end) of the mapping `vma`; its pages are compared and written at `at` on (start: here)."""

    start: int
    end: int
    at: int
    vma: Vma


def of_others(vma: Vma) -> bool:
    """Whether its contents are saved and may be other processes', or other mappings', too."""
    return vma.shared and bool(vma.inode) and not plans.is_special(vma)


def find(vmas: VmaList) -> list[View]:
    """All views of shared objects, ascending by address; each page of an object is `here` in one of them."""
    objects: dict[Key, list[Vma]] = {}
    for vma in vmas:
        if of_others(vma):
            objects.setdefault((vma.dev, vma.inode), []).append(vma)
    out: list[View] = []
    for group in objects.values():
        covered: list[tuple[int, int, int]] = []  # [first, last) bytes of the object, address of the first
        for vma in sorted(group, key=lambda v: not v.prot & Prot.WRITE):
            at, last = vma.offset, vma.offset + vma.size
            shift = vma.start - vma.offset
            while at < last:
                index = bisect.bisect_right(covered, at, key=lambda part: part[0]) - 1
                if index >= 0 and at < covered[index][1]:
                    first, end, addr = covered[index]
                    end = min(last, end)
                    out.append(View(at + shift, end + shift, addr + at - first, vma))
                else:
                    end = min(last, covered[index + 1][0]) if index + 1 < len(covered) else last
                    out.append(View(at + shift, end + shift, at + shift, vma))
                    covered.insert(index + 1, (at, end, at + shift))
                at = end
    return sorted(out, key=lambda view: view.start)


class Views:
    """The views of a checkpoint. rows: its rows, one a page (image.per_page)."""

    def __init__(self, vmas: VmaList, rows: Rows) -> None:
        self.all = find(vmas)
        self._start = np.array([v.start for v in self.all], np.uint64)
        self._end = np.array([v.end for v in self.all], np.uint64)
        self._at = np.array([v.at for v in self.all], np.uint64)
        self._aliased = any(v.at != v.start for v in self.all)
        lacking = np.isin(rows["kind"], (Kind.GUARD, Kind.SPECIAL, Kind.UNREADABLE))
        self._lacking = rows["start"][lacking]  # of a view: the page is not to be had there
        self.rows = self.fold(rows)

    def here(self) -> list[View]:
        """Those whose pages are compared and written in their own place."""
        return [view for view in self.all if view.at == view.start]

    def fold(self, rows: Rows) -> Rows:
        """Rows, one a page, of the process: contents of shared objects once, at the address where they go back."""
        if not self._aliased:
            return rows
        out = rows.copy()
        held = np.isin(out["kind"], (Kind.DATA, Kind.ZERO))
        out["start"][held] = self._translate(out["start"][held])
        # A guard page of another view keeps its own row; of two rows with contents the first is as good.
        out = out[np.lexsort((~held, out["start"]))]
        return out[np.concatenate(([True], np.diff(out["start"]) != 0))] if len(out) else out

    def locate(self, addr: U64) -> Located:
        """As Stored.locate, of the folded rows."""
        rows = self.rows
        if not len(rows):
            zero = np.zeros(len(addr), np.int64)
            return Located(zero, zero, zero, zero)
        row = rows[np.minimum(np.searchsorted(rows["start"], addr), len(rows) - 1)]
        return Located(
            np.where(row["start"] == addr, row["kind"], 0), row["origin"], row["block"], row["first"]
        )

    def _translate(self, addr: U64) -> U64:
        index = np.maximum(np.searchsorted(self._start, addr, side="right").astype(np.int64) - 1, 0)
        inside = (addr >= self._start[index]) & (addr < self._end[index])
        to = addr - self._start[index] + self._at[index]
        usable = inside & ~contained(to, self._lacking)
        out: U64 = np.where(usable, to, addr)
        return out
