"""Write a checkpoint as an ELF core file that gdb, drgn and readelf open (core(5); fs/binfmt_elf.c, elf_core_dump).

Each vma is a PT_LOAD. Memory that the checkpoint holds is written whole (zero pages as holes of a sparse file);
mappings of files without private copies are left to the file, as the kernel does with its default
coredump_filter, except the first page of an ELF file, which debuggers need to find it by build-id; with
`with_files` they are written too.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pagelens.checkpoint import xsave
from pagelens.checkpoint.files import Files
from pagelens.checkpoint.image import Kind, ProcessState, ThreadState
from pagelens.checkpoint.stored import Stored
from pagelens.linux.ptrace import REG_NAMES
from pagelens.vm.errors import DamagedInputError, UsageError
from pagelens.vm.pages import contained
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Prot, Vma

NT_PRSTATUS, NT_FPREGSET, NT_PRPSINFO, NT_AUXV = 1, 2, 3, 6
NT_X86_XSTATE, NT_SIGINFO, NT_FILE = 0x202, 0x53494749, 0x46494C45
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
_CHUNK = 1024


def export(
    store: Stored, out: Path, *, with_files: bool = False, force: bool = False, files: Files | None = None
) -> list[str]:
    """Write the core file `out`; returns notes (pages that could not be had).

    Raises UsageError (it exists), DamagedInputError, OSError.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists; --force overwrites it")
    files = files or Files()
    partial = out.with_name(f".{out.name}.partial")
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        notes = _write(files, fd, store, with_files)
        files.sync(fd)
        files.step("rename")
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    files.sync_dir(out.absolute().parent)
    return notes


def _write(files: Files, fd: int, store: Stored, with_files: bool) -> list[str]:
    vmas = [vma for vma in store.vmas if vma.name != "[vsyscall]"]
    note = b"".join(_notes(store.process))
    count = len(vmas) + 1
    header_size = 64 + 56 * count
    many = count >= PN_XNUM
    sections = header_size
    note_at = header_size + (64 if many else 0)
    data_at = -(-(note_at + len(note)) // PAGE_SIZE) * PAGE_SIZE
    headers = [struct.pack("<IIQQQQQQ", PT_NOTE, 0, note_at, 0, 0, len(note), 0, 4)]
    places: list[tuple[Vma, int, int]] = []
    at = data_at
    for vma in vmas:
        size = _file_size(store, vma, with_files)
        flags = (
            (4 if vma.prot & Prot.READ else 0)
            | (2 if vma.prot & Prot.WRITE else 0)
            | (1 if vma.prot & Prot.EXEC else 0)
        )
        headers.append(struct.pack("<IIQQQQQQ", PT_LOAD, flags, at, vma.start, 0, size, vma.size, PAGE_SIZE))
        places.append((vma, at, size))
        at += size
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    ehdr = ident + struct.pack(
        "<HHIQQQIHHHHHH",
        4,  # ET_CORE
        62,  # EM_X86_64
        1,
        0,
        64,
        sections if many else 0,
        0,
        64,
        56,
        PN_XNUM if many else count,
        64 if many else 0,
        1 if many else 0,
        0,
    )
    files.pwrite(fd, ehdr + b"".join(headers), 0)
    if many:
        files.pwrite(fd, struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, count, 0, 0), sections)
    files.pwrite(fd, note, note_at)
    os.ftruncate(fd, at)
    missing: list[str] = []
    for vma, place, size in places:
        _contents(files, fd, store, vma, place, size, missing)
    return missing


def _file_size(store: Stored, vma: Vma, with_files: bool) -> int:
    # Bytes of the vma that go into the core.
    rows = store.rows
    lo, hi = np.searchsorted(rows["start"], [np.uint64(vma.start), np.uint64(vma.end)])
    kinds = rows["kind"][max(0, int(lo) - 1) : int(hi)]
    starts = rows["start"][max(0, int(lo) - 1) : int(hi)]
    ends = starts + rows["pages"][max(0, int(lo) - 1) : int(hi)] * np.uint64(PAGE_SIZE)
    kinds = kinds[(ends > np.uint64(vma.start)) & (starts < np.uint64(vma.end))]
    if not vma.inode:
        return 0 if (kinds == Kind.SPECIAL).any() or vma.name.startswith("[vvar") else vma.size
    if with_files or (kinds == Kind.DATA).any() or vma.shared:
        return vma.size
    return PAGE_SIZE if vma.offset == 0 and Prot.READ & vma.prot else 0


def _contents(
    files: Files, fd: int, store: Stored, vma: Vma, place: int, size: int, missing: list[str]
) -> None:
    for at in range(vma.start, vma.start + size, _CHUNK * PAGE_SIZE):
        end = min(at + _CHUNK * PAGE_SIZE, vma.start + size)
        addr = np.arange(at, end, PAGE_SIZE, dtype=np.uint64)
        where = store.locate(addr)
        plain = (where.kind == Kind.DATA) | (where.kind == Kind.ZERO)
        pages = store.contents(where)
        others = addr[~plain & ~np.isin(where.kind, (Kind.GUARD, Kind.SPECIAL, Kind.UNREADABLE))]
        if vma.inode and not vma.shared and len(others):
            try:
                pages[contained(addr, others)] = store.pages(others)
            except (DamagedInputError, KeyError) as error:
                missing.append(str(error.args[0]))
        for first, last in _filled(pages):
            files.pwrite(fd, pages[first:last].tobytes(), place + at - vma.start + first * PAGE_SIZE)


def _filled(pages: np.ndarray) -> Iterator[tuple[int, int]]:
    # Runs of pages that are not all zero: the rest stay holes.
    some = np.concatenate(([False], pages.any(axis=1), [False]))
    edges = np.flatnonzero(some[1:] != some[:-1])
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _note(kind: int, data: bytes, name: bytes = b"CORE") -> bytes:
    name += b"\0"
    return (
        struct.pack("<III", len(name), len(data), kind)
        + name.ljust(-(-len(name) // 4) * 4, b"\0")
        + data.ljust(-(-len(data) // 4) * 4, b"\0")
    )


def _notes(process: ProcessState) -> Iterator[bytes]:
    for number, thread in enumerate(process.threads):
        yield _note(NT_PRSTATUS, _prstatus(process, thread))
        if number == 0:
            yield _note(NT_PRPSINFO, _prpsinfo(process))
            yield _note(NT_SIGINFO, bytes(128))
            yield _note(NT_AUXV, process.auxv)
            yield _note(NT_FILE, _nt_file(process))
        yield _note(NT_FPREGSET, thread.fpregs)
        yield _note(NT_X86_XSTATE, xsave.for_gdb(thread.xstate), b"LINUX")


def _prstatus(process: ProcessState, thread: ThreadState) -> bytes:
    # struct elf_prstatus: siginfo, signals, ids, four times (zero), registers, fpvalid.
    head = struct.pack(
        "<iiih2xQQiiii", 0, 0, 0, 0, 0, thread.sigmask, thread.tid, process.ppid, process.pid, 0
    )
    regs = struct.pack("<27Q", *(thread.regs[name] for name in REG_NAMES))
    return head + bytes(64) + regs + struct.pack("<i4x", 1)


def _prpsinfo(process: ProcessState) -> bytes:
    arguments = " ".join(process.cmdline).encode(errors="replace")[:79]
    return struct.pack(
        "<bcbb4xQIIiiii16s80s",
        0,
        b"R",
        0,
        0,
        0,
        process.uid,
        process.gid,
        process.pid,
        process.ppid,
        process.pid,
        0,
        process.comm.encode(errors="replace")[:15],
        arguments,
    )


def _nt_file(process: ProcessState) -> bytes:
    mapped = [vma for vma in process.vmas if vma.inode and vma.name.startswith("/")]
    out = struct.pack("<QQ", len(mapped), PAGE_SIZE)
    out += b"".join(struct.pack("<QQQ", v.start, v.end, v.offset // PAGE_SIZE) for v in mapped)
    return out + b"".join(os.fsencode(v.name) + b"\0" for v in mapped)
