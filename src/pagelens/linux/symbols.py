"""Functions and lines of code addresses, and names of data addresses, by drgn.

A place in a program is (file, build-id, offset in the file): the same in every process and on every run,
whatever the load address. So it is resolved once, and the answer is kept on disk by build-id and offset.
Each file becomes a drgn module of its own at an address range of its own; drgn reads ELF and DWARF, follows
build-ids to separate debug files, and asks debuginfod only where the user has set DEBUGINFOD_URLS.

JIT code has no file: its names come from the perf map that the runtime writes (/tmp/perf-PID.map), [vdso]
from our own (every process of a kernel has the same). What stays unnamed is counted by the caller
(`Place.known`). Rejected: our own ELF and DWARF reader; addr2line (a process per file, slow); symbolizing in
the target's context (the process may be gone).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.linux import elf

_SPAN = 1 << 40  # address room for each module; far more than any file
_DEBUG = Path("/usr/lib/debug/.build-id")


@dataclass(frozen=True, slots=True)
class Code:
    """A place to resolve: a file (or "[vdso]"), its build-id ("" if unknown), the offset in the file."""

    path: str
    offset: int
    build_id: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """What is there. function "" where nothing names it; file and line "" and 0 without debug information.

    offset: bytes behind the start of the function or object.
    """

    function: str = ""
    file: str = ""
    line: int = 0
    offset: int = 0

    @property
    def known(self) -> bool:
        """Whether it has a name."""
        return bool(self.function)

    def __str__(self) -> str:
        at = f" {Path(self.file).name}:{self.line}" if self.line else ""
        return f"{self.function}{at}" if self.function else "?"


UNKNOWN = Place()


def cache_dir() -> Path:
    """Where answers are kept: $PAGELENS_SYMBOL_CACHE, else $XDG_CACHE_HOME/pagelens/symbols."""
    if given := os.environ.get("PAGELENS_SYMBOL_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(home) / "pagelens" / "symbols"


class Symbolizer:
    """Resolves places; keep one for a run. Not for several threads at once."""

    def __init__(self, *, disk_cache: bool = True) -> None:
        self._program: Any = None
        self._modules: dict[tuple[str, str], _Module | None] = {}
        self._memory: dict[Code, Place] = {}
        self._disk = disk_cache
        self._loaded: set[str] = set()
        self._fresh: dict[str, list[tuple[int, Place]]] = {}
        self.hits = 0  # answers from disk, for tests and `--verbose`

    def resolve(self, places: Sequence[Code]) -> list[Place]:
        """What is at each place, in order; each different one is looked up once."""
        todo = [code for code in dict.fromkeys(places) if code not in self._memory]
        for build_id in {c.build_id for c in todo if c.build_id} - self._loaded:
            self._read_disk(build_id)
        for code in todo:
            if code in self._memory:
                continue
            place = self._look(code)
            self._memory[code] = place
            if code.build_id:
                self._fresh.setdefault(code.build_id, []).append((code.offset, place))
        self._write_disk()
        return [self._memory[code] for code in places]

    def _look(self, code: Code) -> Place:
        module = self._module(code.path, code.build_id)
        if module is None:
            return UNKNOWN
        vaddr = module.headers.vaddr_of(code.offset)
        return UNKNOWN if vaddr is None else self._at(module.bias + vaddr)

    def data(self, path: str, build_id: str, vaddr: int) -> Place:
        """The object or function at link-time address `vaddr` of a file (bss has no file offset)."""
        module = self._module(path, build_id)
        return UNKNOWN if module is None else self._at(module.bias + vaddr)

    def extent(self, path: str, build_id: str, vaddr: int) -> tuple[str, int, int] | None:
        """(name, link-time address, size) of the object or function that holds `vaddr`; None where none does."""
        module = self._module(path, build_id)
        if module is None:
            return None
        try:
            symbol = self._program.symbol(module.bias + vaddr)
        except LookupError:
            return None
        return demangle(symbol.name), symbol.address - module.bias, symbol.size

    def _at(self, address: int) -> Place:
        name, offset = "", 0
        try:
            symbol = self._program.symbol(address)
            name, offset = demangle(symbol.name), address - symbol.address
        except LookupError:
            pass
        try:
            location = self._program.source_location(address)[0]
        except LookupError:
            return Place(name, offset=offset)
        # The innermost inlined function is where the instruction really comes from.
        return Place(location.name() or name, location.filename, location.line, offset)

    def _module(self, path: str, build_id: str) -> _Module | None:
        key = (path, build_id)
        if key not in self._modules:
            self._modules[key] = self._load(path, build_id)
        return self._modules[key]

    def _load(self, path: str, build_id: str) -> _Module | None:
        import drgn

        if self._program is None:
            self._program = drgn.Program()
        program = self._program
        fd = _vdso_fd() if path == "[vdso]" else -1
        headers = _headers(path, fd)
        if headers is None or not headers.loads():
            return None
        if build_id and headers.build_id and headers.build_id != build_id:
            return None  # the file was replaced since
        number = len(self._modules) + 1
        module = program.extra_module(path, number, create=True)
        start = number * _SPAN
        module.address_ranges = [(start, start + _SPAN)]
        module.try_file(path, fd=fd, force=True)
        if module.wants_debug_file():
            if os.environ.get("DEBUGINFOD_URLS"):
                program.load_module_debug_info(module)
            else:
                program.find_standard_debug_info([module])
        bias = module.loaded_file_bias
        return None if bias is None else _Module(headers, int(bias))

    def _read_disk(self, build_id: str) -> None:
        self._loaded.add(build_id)
        if not self._disk:
            return
        try:
            lines = _cache_file(build_id).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return
        if not lines or lines[0] != _header(build_id):
            return  # older layout, or debug information has come since
        for line in lines[1:]:
            fields = line.split("\t")
            if len(fields) != 6 or not fields[0]:
                continue  # cut off by a killed writer
            try:
                place = Place(fields[2], fields[3], int(fields[4]), int(fields[5]))
                self._memory[Code(fields[1], int(fields[0], 16), build_id)] = place
                self.hits += 1
            except ValueError:
                continue

    def _write_disk(self) -> None:
        fresh, self._fresh = self._fresh, {}
        if not self._disk:
            return
        path_of = {(c.build_id, c.offset): c.path for c in self._memory}
        for build_id, found in fresh.items():
            file = _cache_file(build_id)
            text = "".join(
                f"{offset:x}\t{path_of[build_id, offset]}\t{p.function}\t{p.file}\t{p.line}\t{p.offset}\n"
                for offset, p in found
            )
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                head = _header(build_id) + "\n"
                old = file.read_text() if file.exists() else ""
                if not old.startswith(head):
                    old = head
                aside = file.with_suffix(f".{os.getpid()}")
                aside.write_text(old + text)
                aside.replace(file)
            except OSError:
                return  # a cache that cannot be written is only slower


@dataclass(frozen=True, slots=True)
class _Module:
    headers: elf.ElfFile
    bias: int


def _cache_file(build_id: str) -> Path:
    return cache_dir() / build_id[:2] / f"{build_id[2:]}.tsv"


def _header(build_id: str) -> str:
    # Part of the header: whether separate debug information is installed, so that installing it renews the
    # cache.
    debug = (_DEBUG / build_id[:2] / f"{build_id[2:]}.debug").exists()
    return (
        f"pagelens-symbols 1 debug={'yes' if debug else 'no'} urls={bool(os.environ.get('DEBUGINFOD_URLS'))}"
    )


def _headers(path: str, fd: int) -> elf.ElfFile | None:
    if fd >= 0:
        return elf.parse(os.pread(fd, 1 << 16, 0))
    try:
        return elf.read(path, os.stat(path).st_ino)  # noqa: PTH116 (one call, no path object needed)
    except OSError:
        return None


def _vdso_fd() -> int:
    # Our own vdso as a file; drgn takes the descriptor.
    fd = os.memfd_create("vdso")
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.endswith("[vdso]\n"):
                start, _, end = line.split()[0].partition("-")
                with open("/proc/self/mem", "rb", buffering=0) as memory:
                    memory.seek(int(start, 16))
                    os.write(fd, memory.read(int(end, 16) - int(start, 16)))
    return fd


@functools.cache
def _demangler() -> Any:
    try:
        function = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_void_p
    return function


@functools.lru_cache(maxsize=1 << 14)
def demangle(name: str) -> str:
    """A C++ name as written, where libstdc++ is there to tell; other names as they are."""
    function = _demangler() if name.startswith("_Z") else None
    if function is None:
        return name
    status = ctypes.c_int()
    pointer = function(name.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return name
    try:
        return ctypes.string_at(pointer).decode(errors="replace")
    finally:
        free = ctypes.CDLL(None).free
        free.argtypes = [ctypes.c_void_p]
        free(pointer)


class PerfMap:
    """Names of JIT code: lines "START SIZE name" in hexadecimal, later lines win where they overlap."""

    def __init__(self, lines: Iterable[str]) -> None:
        rows: dict[int, tuple[int, str]] = {}
        for line in lines:
            fields = line.rstrip("\n").split(None, 2)
            try:
                rows[int(fields[0], 16)] = (int(fields[1], 16), fields[2])
            except (IndexError, ValueError):
                continue  # a line being written
        self._starts = np.array(sorted(rows), dtype=np.uint64)
        self._rows = [rows[int(s)] for s in self._starts.tolist()]

    @classmethod
    def of(cls, pid: int, directory: Path | None = None) -> PerfMap | None:
        """The map of a process from `directory` (a capture's), else from /tmp; None without one."""
        for path in (*([directory / f"perf-{pid}.map"] if directory else []), Path(f"/tmp/perf-{pid}.map")):
            try:
                with path.open(errors="replace") as file:
                    return cls(file)
            except OSError:
                continue
        return None

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, address: int) -> Place:
        """The name at `address`."""
        index = int(np.searchsorted(self._starts, np.uint64(address), side="right")) - 1
        if index < 0:
            return UNKNOWN
        start = int(self._starts[index])
        size, name = self._rows[index]
        return Place(name, offset=address - start) if address < start + size else UNKNOWN
