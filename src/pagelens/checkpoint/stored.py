"""Read a checkpoint from its directory: contents by address, page states, vmas, threads. A PageSource.

Opening checks the manifest; reading checks every block that it touches against its checksum, so damage is an
error at the read and never wrong bytes. `verify` checks everything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint import tables
from pagelens.checkpoint.image import OWN, RAW, U64, Kind, ProcessState, Rows, ThreadState, lookup, page_runs
from pagelens.checkpoint.store import FORMAT, VERSION
from pagelens.linux import pagecopy
from pagelens.vm.errors import DamagedInputError, UsageError
from pagelens.vm.pages import PageRuns
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE, page_down, page_up
from pagelens.vm.vma import VmaList

_CACHE_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Located:
    """Where contents are, a row an address. kind: image.Kind or 0 (absent); origin, block, first as in
    rows."""

    kind: Any
    origin: Any
    block: Any
    first: Any


class Stored:
    """One checkpoint on disk, open for reading.

    Raises DamagedInputError for what is no checkpoint, is damaged, or whose parents are missing; UsageError
    where there is nothing.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.id: str = manifest["id"]
        self._origins: dict[int, Stored] = {}
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, path: Path | str) -> Stored:
        """Open and check the manifest."""
        path = Path(path).absolute()
        if not path.is_dir():
            raise UsageError(f"no checkpoint {path}")
        try:
            text = (path / "manifest.json").read_bytes()
            digest = (path / "manifest.sha256").read_bytes()
        except FileNotFoundError as error:
            raise DamagedInputError(
                f"{path} is no checkpoint: it has no {Path(error.filename).name}"
            ) from None
        if digest != hashlib.sha256(text).hexdigest().encode() + b"\n":
            raise DamagedInputError(f"{path}: the manifest is damaged (its checksum differs)")
        manifest = json.loads(text)
        if manifest.get("format") != FORMAT:
            raise DamagedInputError(f"{path} is no checkpoint of pagelens")
        if manifest["version"] != VERSION:
            raise DamagedInputError(
                f"{path} has store version {manifest['version']}; this pagelens reads {VERSION}"
            )
        return cls(path, manifest)

    def _table(self, name: str) -> Any:
        import pyarrow.parquet as pq

        path = self.path / name
        entry = self.manifest["files"][name]
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamagedInputError(f"{self.path}: {name} is missing") from None
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise DamagedInputError(f"{self.path}: {name} is damaged (its checksum differs)")
        import pyarrow as pa

        # Small tables: read_table's scan for more files, and threads, take five times as long as reading.
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)

    @cached_property
    def rows(self) -> Rows:
        """image.ROW runs, ascending."""
        return tables.to_rows(self._table("runs.parquet"))

    @cached_property
    def vmas(self) -> VmaList:
        """The vma list (cut to the range of a ranged checkpoint)."""
        return tables.to_vmas(self._table("vmas.parquet"))

    @cached_property
    def threads(self) -> tuple[ThreadState, ...]:
        """Threads with their registers."""
        return tables.to_threads(self._table("threads.parquet"))

    @cached_property
    def process(self) -> ProcessState:
        """All that is not memory."""
        return tables.to_process(self.manifest["process"], self.vmas, self.threads)

    @cached_property
    def _blocks(self) -> tuple[Rows, Any, Any]:
        return tables.to_blocks(self._table("blocks.parquet"))

    @property
    def blocks(self) -> Rows:
        """image.BLOCK rows of its own pack."""
        return self._blocks[0]

    def page_hashes(self, block: Any, first: Any) -> U64:
        """Hashes of pages of its own pack."""
        _, hashes, begin = self._blocks
        found: U64 = hashes[begin[block] + first.astype(np.int64)]
        return found

    def own_pages(self) -> tuple[U64, Any, Any]:
        """(hash, block, first) of every page in its own pack."""
        blocks, hashes, begin = self._blocks
        number = np.repeat(np.arange(len(blocks)), blocks["pages"].astype(np.int64))
        first = np.arange(len(hashes), dtype=np.int64) - begin[number]
        return hashes, number.astype(np.int32), first.astype(np.uint32)

    @cached_property
    def _pack(self) -> Any:
        path = self.path / "pages.pack"
        try:
            if path.stat().st_size != self.manifest["pack_bytes"]:
                raise DamagedInputError(
                    f"{path} has {path.stat().st_size} bytes, its manifest says {self.manifest['pack_bytes']}"
                )
            return np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError:
            raise DamagedInputError(f"{self.path}: pages.pack is missing") from None

    def block(self, number: int) -> np.ndarray:
        """uint8[pages, 4096] of a block of its own pack, checked. DamagedInputError."""
        held = self._cache.get(number)
        if held is not None:
            self._cache.move_to_end(number)
            return held
        row = self.blocks[number]
        pages = int(row["pages"])
        raw = self._raw(number)
        if row["codec"] != RAW:
            import zstandard

            try:
                plain = zstandard.ZstdDecompressor().decompress(raw.data, max_output_size=pages * PAGE_SIZE)
            except zstandard.ZstdError as error:
                raise DamagedInputError(f"{self.path}/pages.pack: block {number}: {error}") from None
            raw = np.frombuffer(plain, np.uint8)
        if len(raw) != pages * PAGE_SIZE:
            raise DamagedInputError(f"{self.path}/pages.pack: block {number} has the wrong length")
        out = raw.reshape(pages, PAGE_SIZE)
        self._cache[number] = out
        if len(self._cache) > _CACHE_BLOCKS:
            self._cache.popitem(last=False)
        return out

    def _raw(self, number: int) -> np.ndarray:
        # A block as it lies in the pack, checked.
        row = self.blocks[number]
        offset, stored = int(row["offset"]), int(row["stored"])
        raw = np.asarray(self._pack[offset : offset + stored])
        if len(raw) != stored or pagecopy.hash_bytes(raw) != int(row["sum"]):
            raise DamagedInputError(f"{self.path}/pages.pack: block {number} at byte {offset} is damaged")
        return raw

    def check(self, where: Located) -> None:
        """Every block that holds contents of these pages is there and has its checksum. DamagedInputError."""
        data = where.kind == Kind.DATA
        for number in np.unique(where.origin[data]).tolist():
            store = self.origin(number)
            for block in np.unique(where.block[data & (where.origin == number)]).tolist():
                store._raw(block)

    def origin(self, number: int) -> Stored:
        """The checkpoint that holds contents for rows of origin `number` (OWN: this one)."""
        if number == OWN:
            return self
        if number not in self._origins:
            entry = self.manifest["origins"][number]
            path = Path(os.path.normpath(self.path / entry["path"]))
            if not path.is_dir():
                raise DamagedInputError(f"{self.path} needs {path}, which is missing")
            other = Stored.open(path)
            if other.id != entry["id"]:
                raise DamagedInputError(
                    f"{self.path} needs another checkpoint than the one that {path} is now"
                )
            self._origins[number] = other
        return self._origins[number]

    def locate(self, addr: U64) -> Located:
        """Where the contents of each page are."""
        index = lookup(self.rows, addr)
        if not len(self.rows):
            zero = np.zeros(len(addr), np.int64)
            return Located(zero, zero, zero, zero)
        row = self.rows[np.maximum(index, 0)]
        within = ((addr - row["start"]) >> np.uint64(PAGE_SHIFT)).astype(np.uint32)
        first = row["first"] + np.where(row["kind"] == Kind.DATA, within, np.uint32(0))
        return Located(np.where(index < 0, 0, row["kind"]), row["origin"], row["block"], first)

    def hashes(self, where: Located) -> U64:
        """Content hash of each DATA page, 0 for others."""
        out = np.zeros(len(where.kind), np.uint64)
        data = where.kind == Kind.DATA
        for number in np.unique(where.origin[data]).tolist():
            mine = data & (where.origin == number)
            out[mine] = self.origin(number).page_hashes(where.block[mine], where.first[mine])
        return out

    def contents(self, where: Located) -> np.ndarray:
        """uint8[n, 4096]: contents of DATA pages; zeros for all others."""
        out = np.zeros((len(where.kind), PAGE_SIZE), np.uint8)
        data = np.flatnonzero(where.kind == Kind.DATA)
        order = data[np.lexsort((where.block[data], where.origin[data]))]
        if not len(order):
            return out
        change = (np.diff(where.origin[order]) != 0) | (np.diff(where.block[order]) != 0)
        for group in np.split(order, np.flatnonzero(change) + 1):
            source = self.origin(int(where.origin[group[0]])).block(int(where.block[group[0]]))
            out[group] = source[where.first[group]]
        return out

    def pages(self, addr: U64) -> np.ndarray:
        """uint8[n, 4096] of mapped pages, file pages from their files.

        KeyError for a page without contents (unmapped, guard, special, unreadable). DamagedInputError where a
        file that is referred to has changed since.
        """
        vma_index = self.vmas.find_many(addr)
        if (vma_index < 0).any():
            raise KeyError(f"{int(addr[vma_index < 0][0]):#x} is not mapped in this checkpoint")
        where = self.locate(addr)
        lacking = np.isin(where.kind, (Kind.GUARD, Kind.SPECIAL, Kind.UNREADABLE))
        if lacking.any():
            at = int(np.flatnonzero(lacking)[0])
            raise KeyError(
                f"{int(addr[at]):#x} has no contents ({Kind(int(where.kind[at])).name.lower()} page)"
            )
        out = self.contents(where)
        backed = np.array([bool(v.inode) and v.name.startswith("/") and not v.shared for v in self.vmas])
        private_file = backed[vma_index] if len(backed) else np.zeros(len(addr), bool)
        by_file = (where.kind == Kind.FILE) | ((where.kind == 0) & private_file)
        for at in np.flatnonzero(by_file).tolist():
            vma = self.vmas[int(vma_index[at])]
            data = self.file_page(vma.name, vma.offset + int(addr[at]) - vma.start)
            out[at, : len(data)] = np.frombuffer(data, np.uint8)
        return out

    def file_page(self, name: str, offset: int) -> bytes:
        """A page of a mapped file that was not stored, from the file. DamagedInputError where it has changed."""
        entry = self.manifest["process"]["mapped_files"].get(name, {"missing": "it was not recorded"})
        if "missing" in entry:
            raise DamagedInputError(
                f"pages of {name} were not stored and it cannot be had: {entry['missing']}"
            )
        try:
            stat = Path(name).stat()
            if (stat.st_size, stat.st_mtime_ns) != (entry["size"], entry["mtime_ns"]):
                raise DamagedInputError(
                    f"{name} has changed since the checkpoint; --with-files would have stored it"
                )
            with open(name, "rb") as file:
                return os.pread(file.fileno(), PAGE_SIZE, offset)
        except OSError as error:
            raise DamagedInputError(f"pages of {name} were not stored: {error.strerror}") from None

    def read(self, addr: int, length: int) -> bytes:
        """`length` bytes from `addr`. KeyError for an address without contents."""
        start, end = page_down(addr), page_up(addr + length)
        flat = self.pages(np.arange(start, end, PAGE_SIZE, dtype=np.uint64))
        return flat.tobytes()[addr - start : addr - start + length]

    def runs(self) -> PageRuns:
        """Page states as recorded."""
        return page_runs(self.rows)

    def snapshot(self) -> Snapshot:
        """As a Snapshot: what `map`, `pages` and `diff` take."""
        return Snapshot(
            pid=self.manifest["process"]["pid"],
            time_ns=self.manifest["process"]["time_ns"],
            vmas=self.vmas,
            pages=self.runs(),
            method=f"checkpoint {self.path.name} ({self.manifest['method']})",
            complete=self.manifest["complete"],
            notes=tuple(self.manifest["notes"]),
        )
