"""Which captured pages need not be stored: unchanged since the parent, or equal to a page stored before.

The page at the same address of the parent is compared by its 64-bit hash. With dedup, any stored page of
equal hash is a candidate and is compared byte by byte before it is used. Origins are flattened: a row
points to the checkpoint that holds the bytes, never to one that points on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint.image import OWN, Kind
from pagelens.checkpoint.stored import Located, Stored
from pagelens.linux import pagecopy
from pagelens.vm.errors import UsageError
from pagelens.vm.units import PAGE_SIZE


@dataclass(slots=True)
class Known:
    """Where each page is stored already; block = -1 where it is not."""

    origin: Any
    block: Any
    first: Any


class Reuse:
    """The pages that a new checkpoint at `final` may refer to."""

    def __init__(self, final: Path, parent: Path | None, dedup: tuple[Path, ...] | None) -> None:
        self.final = final
        self.parent = Stored.open(parent) if parent is not None else None
        if self.parent is not None and self.parent.path == final:
            raise UsageError("a checkpoint cannot be its own parent")
        self.origins: list[dict[str, str]] = []
        self._stores: list[Stored] = []
        self._number: dict[str, int] = {}
        self._dedup = dedup is not None
        self._own_table: tuple[Any, Any, Any] | None = None
        self.read_back: Callable[[Any, Any], Any] = _nothing
        self._table: tuple[Any, Any, Any, Any] | None = None
        self._map: Any = None
        if self.parent is not None:
            self._map = np.array(
                [self.number(self.parent.origin(k)) for k in range(-1, len(self.parent.manifest["origins"]))]
            )
        if dedup is not None:
            for path in dedup:
                other = Stored.open(path)
                for k in range(-1, len(other.manifest["origins"])):
                    self.number(other.origin(k))
            self._load()

    def number(self, store: Stored) -> int:
        """Its number among the origins of the new checkpoint."""
        if store.id not in self._number:
            self._number[store.id] = len(self.origins)
            self.origins.append({"id": store.id, "path": os.path.relpath(store.path, self.final)})
            self._stores.append(store)
        return self._number[store.id]

    def translate(self, origin: Any) -> Any:
        """Origins of the parent's rows as origins of the new checkpoint."""
        return self._map[np.asarray(origin, np.int64) + 1]

    def parent_entry(self) -> dict[str, str] | None:
        """The manifest's `parent`."""
        if self.parent is None:
            return None
        return {"id": self.parent.id, "path": os.path.relpath(self.parent.path, self.final)}

    def _load(self) -> None:
        parts = []
        for number, store in enumerate(self._stores):
            hashes, block, first = store.own_pages()
            parts.append((hashes, np.full(len(hashes), number, np.int16), block, first))
        if parts:
            hashes, origin, block, first = (np.concatenate([p[i] for p in parts]) for i in range(4))
            order = np.argsort(hashes, kind="stable")
            self._table = (hashes[order], origin[order], block[order], first[order])

    def find(self, addr: Any, hashes: Any, data: pagecopy.U8, wanted: Any) -> Known:
        """Where each wanted page is stored already."""
        count = len(addr)
        known = Known(np.full(count, OWN, np.int16), np.full(count, -1, np.int32), np.zeros(count, np.uint32))
        if self.parent is not None:
            where = self.parent.locate(addr)
            same = wanted & (where.kind == Kind.DATA)
            same[same] = self.parent.hashes(_take(where, same)) == hashes[same]
            known.origin[same] = self.translate(where.origin[same])
            known.block[same], known.first[same] = where.block[same], where.first[same]
        if self._dedup:
            self._find_equal(hashes, data, wanted & (known.block < 0), known)
        return known

    def _find_equal(self, hashes: Any, data: pagecopy.U8, wanted: Any, known: Known) -> None:
        pages = data.reshape(-1, PAGE_SIZE)
        if self._table is not None and len(self._table[0]):
            table, origin, block, first = self._table
            at = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            hit = np.flatnonzero(wanted & (table[at] == hashes))
            for number in np.unique(origin[at[hit]]).tolist():
                mine = hit[origin[at[hit]] == number]
                where = Located(
                    np.full(len(mine), Kind.DATA), np.full(len(mine), OWN), block[at[mine]], first[at[mine]]
                )
                equal = (self._stores[number].contents(where) == pages[mine]).all(axis=1)
                sure = mine[equal]
                known.origin[sure], known.block[sure] = number, block[at[sure]]
                known.first[sure] = first[at[sure]]
                wanted[sure] = False
        own = self._own_table
        if own is not None:
            table, block, first = own
            at = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            hit = np.flatnonzero(wanted & (table[at] == hashes))
            if len(hit):
                equal = (self.read_back(block[at[hit]], first[at[hit]]) == pages[hit]).all(axis=1)
                sure = hit[equal]
                known.origin[sure], known.block[sure], known.first[sure] = (
                    OWN,
                    block[at[sure]],
                    first[at[sure]],
                )

    def added(self, hashes: Any, block: Any, first: Any) -> None:
        """Pages just appended: later ones may refer to them (with dedup)."""
        if not self._dedup:
            return
        own = self._own_table or (np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.uint32))
        joined = [np.concatenate(pair) for pair in zip(own, (hashes, block, first), strict=True)]
        order = np.argsort(joined[0], kind="stable")
        self._own_table = (joined[0][order], joined[1][order], joined[2][order])

    def twins(self, hashes: Any, data: pagecopy.U8) -> Any:
        """int64[n]: for pages about to be appended, the index of the first equal one among them."""
        count = len(hashes)
        if not self._dedup:
            return np.arange(count)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        twin = first[inverse]
        pages = data.reshape(-1, PAGE_SIZE)
        differs = np.flatnonzero(twin != np.arange(count))
        wrong = differs[(pages[differs] != pages[twin[differs]]).any(axis=1)]
        twin[wrong] = wrong
        return twin


def _nothing(block: Any, first: Any) -> Any:
    raise AssertionError((block, first))


def _take(where: Located, mask: Any) -> Located:
    return Located(where.kind[mask], where.origin[mask], where.block[mask], where.first[mask])
