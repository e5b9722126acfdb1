"""CRIU's page images: read them (with their parents) as a PageSource, and write them.

    pagemap-PID.img   u32 0x54564319, u32 0x56084025, then {u32 size, protobuf}: pagemap_head{pages_id = 1},
                      then pagemap_entry{vaddr = 1, nr_pages = 2 (older), in_parent = 3, flags = 4, nr_pages = 5}
    pages-ID.img      contents of the PRESENT entries, in order, no header
    parent            symbolic link to the directory of the parent's images
    inventory.img     u32 0x58313116, {u32 size, protobuf}

Only memory is exchanged: a full restorable image set needs CRIU's own dump of everything else (files, sockets,
credentials), which a checkpoint of pagelens does not hold; the export says so.
Source: criu/images/pagemap.proto, criu/include/magic.h, criu/pagemap.c (4.2).
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagelens.checkpoint.files import Files
from pagelens.checkpoint.image import Kind, compress, per_page
from pagelens.checkpoint.protobuf import field, fields
from pagelens.checkpoint.stored import Stored
from pagelens.vm.errors import DamagedInputError, UsageError
from pagelens.vm.pages import PageRuns, PageState, contained
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE

COMMON, PAGEMAP_MAGIC, INVENTORY_MAGIC = 0x54564319, 0x56084025, 0x58313116
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4
IMG_VERSION = 2
_CHUNK = 1024


class CriuPages:
    """The memory of one process in a CRIU image directory. A PageSource.

    Raises UsageError (no such image), DamagedInputError (not CRIU's, cut off, a parent missing).
    """

    def __init__(self, directory: Path, pid: int | None = None, _depth: int = 0) -> None:
        if _depth > 1000:
            raise DamagedInputError(f"{directory}: the chain of parents does not end")
        self.directory = directory
        found = sorted(directory.glob("pagemap-[0-9]*.img"))
        if pid is None and len(found) == 1:
            pid = int(found[0].name[8:-4])
        if pid is None:
            names = ", ".join(path.name[8:-4] for path in found) or "none"
            raise UsageError(f"{directory} has images of processes {names}; say which")
        path = directory / f"pagemap-{pid}.img"
        if not path.is_file():
            raise UsageError(f"no image {path}")
        self.pid = pid
        messages = read_image(path, PAGEMAP_MAGIC)
        if not messages:
            raise DamagedInputError(f"{path} has no head")
        self.pages_id = int(dict(fields(messages[0])).get(1, 0))
        entries = [_entry(message) for message in messages[1:]]
        self.start = np.array([e[0] for e in entries], np.uint64)
        self.count = np.array([e[1] for e in entries], np.uint64)
        self.flags = np.array([e[2] for e in entries], np.uint32)
        present = np.where((self.flags & PE_PRESENT) != 0, self.count, np.uint64(0)).astype(np.int64)
        self._first = np.cumsum(present) - present
        self._pages = directory / f"pages-{self.pages_id}.img"
        if int(present.sum()):
            size = self._pages.stat().st_size if self._pages.is_file() else 0
            if size < int(present.sum()) * PAGE_SIZE:
                raise DamagedInputError(
                    f"{self._pages} has {size} bytes, {path.name} needs {present.sum() * PAGE_SIZE}"
                )
            self._data = np.memmap(self._pages, np.uint8, mode="r")
        self.parent: CriuPages | None = None
        if ((self.flags & PE_PARENT) != 0).any():
            link = directory / "parent"
            if not link.is_dir():
                raise DamagedInputError(f"{directory} needs its parent, and {link} leads nowhere")
            self.parent = CriuPages(link, pid, _depth + 1)

    def runs(self) -> PageRuns:
        """Pages with contents here or in a parent; lazy ones count as swapped (somebody else has them)."""
        state = np.full(len(self.start), int(PageState.PRESENT), np.uint32)
        state[(self.flags & (PE_PRESENT | PE_PARENT)) == 0] = int(PageState.SWAPPED)
        return PageRuns(self.start, self.count, state)

    def pages(self, addr: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """uint8[n, 4096]. KeyError where the images lack one (it was absent, or is lazy)."""
        shift = np.uint64(PAGE_SHIFT)
        index = np.searchsorted(self.start, addr, side="right").astype(np.int64) - 1
        at = np.maximum(index, 0)
        outside = (
            (index < 0) | (addr >= self.start[at] + (self.count[at] << shift))
            if len(self.start)
            else np.ones(len(addr), bool)
        )
        if outside.any():
            raise KeyError(f"{int(addr[outside][0]):#x} is not in the images")
        flags = self.flags[at]
        older, here = (flags & PE_PARENT) != 0, (flags & (PE_PARENT | PE_PRESENT)) == PE_PRESENT
        if not (older | here).all():
            raise KeyError(f"{int(addr[~(older | here)][0]):#x} is lazy: its contents are elsewhere")
        out = np.empty((len(addr), PAGE_SIZE), np.uint8)
        if older.any():
            assert self.parent is not None
            out[older] = self.parent.pages(addr[older])
        if here.any():
            number = self._first[at[here]] + ((addr[here] - self.start[at[here]]) >> shift).astype(np.int64)
            out[here] = self._data[: len(self._data) // PAGE_SIZE * PAGE_SIZE].reshape(-1, PAGE_SIZE)[number]
        return out

    def page(self, addr: int) -> bytes:
        """One page. KeyError as `pages`."""
        return self.pages(np.array([addr], np.uint64)).tobytes()

    def read(self, addr: int, length: int) -> bytes:
        """`length` bytes from `addr`. KeyError as `page`."""
        first = addr - addr % PAGE_SIZE
        data = b"".join(self.page(at) for at in range(first, addr + length, PAGE_SIZE))
        return data[addr - first : addr - first + length]


def read_image(path: Path, magic: int) -> list[bytes]:
    """The protobuf messages of an image file. DamagedInputError."""
    data = path.read_bytes()
    if len(data) < 8 or struct.unpack_from("<II", data) != (COMMON, magic):
        raise DamagedInputError(f"{path} is no CRIU image of this kind (its magic differs)")
    out, at = [], 8
    while at < len(data):
        if at + 4 > len(data):
            raise DamagedInputError(f"{path} is cut off")
        (size,) = struct.unpack_from("<I", data, at)
        if at + 4 + size > len(data):
            raise DamagedInputError(f"{path} is cut off")
        out.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return out


def _entry(message: bytes) -> tuple[int, int, int]:
    values = {number: int(value) for number, value in fields(message) if isinstance(value, int)}
    count = values.get(5) or values.get(2, 0)
    flags = values.get(4)
    if flags is None:  # before flags: in_parent or present
        flags = PE_PARENT if values.get(3) else PE_PRESENT
    return values.get(1, 0), count, flags


def export(store: Stored, out: Path, *, parent: Path | None = None, files: Files | None = None) -> list[str]:
    """Write pagemap-PID.img, pages-1.img and inventory.img into the new directory `out`; returns notes.

    parent: a directory of images of this process; pages that are equal there are marked as in the parent.
    Raises UsageError (out exists, parent is of another process), DamagedInputError, OSError.
    """
    if out.exists():
        raise UsageError(f"{out} exists")
    pid = store.process.pid
    older = CriuPages(parent, pid) if parent is not None else None
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir()
    files = files or Files()
    flat = per_page(store.rows)
    flat = flat[np.isin(flat["kind"], (Kind.DATA, Kind.ZERO))]
    known = older.runs().addresses() if older is not None else np.empty(0, np.uint64)
    in_parent = np.zeros(len(flat), bool)
    try:
        fd = os.open(partial / "pages-1.img", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for at in range(0, len(flat), _CHUNK):
                addr = flat["start"][at : at + _CHUNK]
                pages = store.contents(store.locate(addr))
                same = np.zeros(len(addr), bool)
                if older is not None:
                    shared = contained(addr, known)
                    same[shared] = (older.pages(addr[shared]) == pages[shared]).all(axis=1)
                in_parent[at : at + _CHUNK] = same
                files.write(fd, np.ascontiguousarray(pages[~same]).data)
            files.sync(fd)
        finally:
            os.close(fd)
        flat["kind"] = np.where(in_parent, np.uint8(Kind.FILE), np.uint8(Kind.ZERO))
        for name in ("state", "origin", "block", "first"):
            flat[name] = 0
        entries = [field(1, 1)]
        for row in compress(flat):
            mark = PE_PARENT if row["kind"] == Kind.FILE else PE_PRESENT
            count = int(row["pages"])
            body = field(1, int(row["start"])) + field(2, min(count, 2**32 - 1))
            entries.append(
                body + (field(3, 1) if mark == PE_PARENT else b"") + field(4, mark) + field(5, count)
            )
        files.put(partial / f"pagemap-{pid}.img", _image(PAGEMAP_MAGIC, entries))
        # inventory_entry{img_version = 1}: CRIU reads it first; "crit decode" reads it too.
        body = field(1, IMG_VERSION)
        files.put(
            partial / "inventory.img",
            struct.pack("<I", INVENTORY_MAGIC) + struct.pack("<I", len(body)) + body,
        )
        if parent is not None:
            (partial / "parent").symlink_to(os.path.relpath(parent, out))
        files.publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [
        "memory only: criu restore also needs the images that only its own dump makes (core, mm, files, …)"
    ]


def _image(magic: int, messages: list[bytes]) -> bytes:
    return struct.pack("<II", COMMON, magic) + b"".join(struct.pack("<I", len(m)) + m for m in messages)
