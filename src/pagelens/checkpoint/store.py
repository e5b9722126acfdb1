"""The store: one checkpoint = one directory, written once, never changed (docs/checkpoint.md has the format).

    manifest.json     what it is, its parent and origins, size and SHA-256 of every table
    manifest.sha256   SHA-256 of manifest.json
    runs.parquet      rows (image.ROW): where the contents of each page are
    blocks.parquet    blocks of the pack (image.BLOCK), each with its checksum and its pages' hashes
    vmas.parquet, threads.parquet
    pages.pack        16-byte header, then the blocks, gapless

Rejected: one file per page or vma (too many files), a database (its own recovery on top of ours), appending
increments to the parent's directory (a crash could damage the parent).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pagelens.checkpoint import tables
from pagelens.checkpoint.files import Files, WriteLock, partial
from pagelens.checkpoint.image import BLOCK, BLOCK_PAGES, RAW, ZSTD, ProcessState, Rows
from pagelens.linux import pagecopy
from pagelens.vm.errors import UsageError
from pagelens.vm.units import PAGE_SIZE

FORMAT, VERSION = "pagelens-checkpoint", 1
PACK_MAGIC = b"PLPACK01"
_SMALL = 1 << 16  # bytes of a table
TABLES = ("runs.parquet", "blocks.parquet", "vmas.parquet", "threads.parquet")


class Writer:
    """Writes one checkpoint. Context manager: leaving it without `finish` leaves nothing behind.

    level: zstd level, 0 = not compressed. adopting: it will be the one that is there, with more in its pack
    (`adopt`). Raises UsageError where `final` exists (without force), where a checkpoint beside it needs what is
    there, or another writer has it.
    """

    def __init__(
        self,
        final: Path,
        *,
        level: int = 1,
        force: bool = False,
        adopting: bool = False,
        files: Files | None = None,
    ) -> None:
        self.final = final.absolute()
        self.partial = partial(self.final)
        self.id = uuid.uuid4().hex
        self.files = files or Files()
        self.level = level
        self.force = force
        self._adopting = adopting
        self._lock = WriteLock(self.final)
        self._pack = -1
        self._at = 0
        self._blocks: list[tuple[int, ...]] = []
        self._hashes: list[np.ndarray] = []
        self._compressor: Any = None
        self.done = False

    def __enter__(self) -> Writer:
        if not self.final.parent.is_dir():
            raise UsageError(f"{self.final.parent} is not a directory")
        self._lock.__enter__()
        try:
            if self.final.exists() and not self.force:
                raise UsageError(f"{self.final} exists; --force replaces it")
            if self.final.exists() and not (self.final / "manifest.json").exists():
                raise UsageError(f"{self.final} exists and is no checkpoint; not replaced")
            if self.final.exists() and not self._adopting:
                _refuse_needed(self.final)
            shutil.rmtree(self.partial, ignore_errors=True)  # of a writer that was killed: we hold the lock
            self.partial.mkdir(mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._pack = os.open(self.partial / "pages.pack", flags, 0o600)
            header = PACK_MAGIC + bytes.fromhex(self.id)[:8]
            self.files.write(self._pack, header)
            self._at = len(header)
            if self.level:
                import zstandard

                self._compressor = zstandard.ZstdCompressor(level=self.level, write_content_size=True)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def _abandon(self) -> None:
        if self._pack >= 0:
            os.close(self._pack)
            self._pack = -1
        if not self.done:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.__exit__(None, None, None)

    @property
    def pack_bytes(self) -> int:
        """Bytes of the pack so far."""
        return self._at

    def append(self, data: pagecopy.U8, hashes: pagecopy.U64) -> tuple[np.ndarray, np.ndarray]:
        """Store pages (uint8[n * 4096]); returns (block int32[n], index within it uint32[n])."""
        pages = len(hashes)
        first = len(self._blocks)
        held: list[memoryview | bytes] = []
        for at in range(0, pages, BLOCK_PAGES):
            count = min(BLOCK_PAGES, pages - at)
            raw = data[at * PAGE_SIZE : (at + count) * PAGE_SIZE]
            stored: memoryview | bytes = raw.data
            codec = RAW
            if self._compressor is not None:
                packed = self._compressor.compress(raw.data)
                if len(packed) < len(raw):
                    stored, codec = packed, ZSTD
            self._blocks.append((self._at, len(stored), count, codec, pagecopy.hash_bytes(stored)))
            self._hashes.append(hashes[at : at + count])
            self._at += len(stored)
            held.append(stored)
        if self._compressor is None:
            self.files.write(self._pack, data.data)
        else:
            self.files.write(self._pack, b"".join(held))
        number = np.arange(pages, dtype=np.int64)
        return (first + number // BLOCK_PAGES).astype(np.int32), (number % BLOCK_PAGES).astype(np.uint32)

    def adopt(self, store: Any) -> None:
        """Take over the id and the whole pack of a checkpoint that this one replaces (before any append)."""
        self.id = store.id
        os.ftruncate(self._pack, 0)
        os.lseek(self._pack, 0, os.SEEK_SET)
        with open(store.path / "pages.pack", "rb") as pack:
            while data := pack.read(1 << 24):
                self.files.write(self._pack, data)
        self._at = int(store.manifest["pack_bytes"])
        blocks, hashes, begin = store.blocks, store.own_pages()[0], 0
        for row in blocks:
            self._blocks.append(tuple(int(row[name]) for name in BLOCK.names or ()))
            self._hashes.append(hashes[begin : begin + int(row["pages"])])
            begin += int(row["pages"])

    def read_back(self, block: Any, first: Any) -> np.ndarray:
        """uint8[n, 4096]: pages that were appended, read from the pack."""
        out = np.empty((len(block), PAGE_SIZE), np.uint8)
        for number in np.unique(block).tolist():
            offset, stored, pages, codec, _ = self._blocks[number]
            raw = os.pread(self._pack, stored, offset)
            if codec == ZSTD:
                import zstandard

                raw = zstandard.ZstdDecompressor().decompress(raw, max_output_size=pages * PAGE_SIZE)
            mine = block == number
            out[mine] = np.frombuffer(raw, np.uint8).reshape(-1, PAGE_SIZE)[first[mine]]
        return out

    def finish(self, state: ProcessState, rows: Rows, meta: dict[str, Any]) -> Path:
        """Write the tables and the manifest, sync, and rename into place. Returns the final path."""
        self.files.sync(self._pack)
        blocks = np.array(self._blocks, dtype=BLOCK) if self._blocks else np.empty(0, BLOCK)
        content = {
            "runs.parquet": tables.runs(rows),
            "blocks.parquet": tables.blocks(blocks, self._hashes),
            "vmas.parquet": tables.vmas(state.vmas),
            "threads.parquet": tables.threads(state.threads),
        }
        listing = {}
        for name, table in content.items():
            data = _parquet(table)
            self.files.put(self.partial / name, data)
            listing[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            **meta,
            "process": tables.process(state),
            "pack_bytes": self._at,
            "files": listing,
        }
        text = json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"
        self.files.put(self.partial / "manifest.json", text)
        self.files.put(self.partial / "manifest.sha256", hashlib.sha256(text).hexdigest().encode() + b"\n")
        self.files.publish(self.partial, self.final)
        self.done = True
        return self.final


def _refuse_needed(path: Path) -> None:
    # Another checkpoint in its place has another id: those that refer to it would become unreadable.
    for other in sorted(path.parent.iterdir()):
        if other == path or other.name.startswith("."):
            continue
        try:
            manifest = json.loads((other / "manifest.json").read_bytes())
            origins = [os.path.normpath(other / entry["path"]) for entry in manifest["origins"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if str(path) in origins:
            raise UsageError(f"{other} needs {path}, which this would replace; nothing was touched")


def _parquet(table: Any) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    if (
        table.nbytes < _SMALL
    ):  # a column is some bytes: what each costs by itself is then nearly all of the time
        pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    else:
        pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
