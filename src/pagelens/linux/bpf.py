"""The BPF object: load it, attach it, reach its maps. libbpf is opened with ctypes when it is first needed.

Why ctypes and the system's libbpf: the C core stays libc-only, and where libbpf or the object is missing
pagelens still works (`CapabilityMissingError` says what is then unknown). Rejected: bcc (compiles at run
time, needs kernel headers); a skeleton linked into the core (a hard dependency on libbpf); loading by hand
(CO-RE relocation is a library's job).

Sources: bpf(2), perf_event_open(2), tools/lib/bpf in the kernel tree.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pagelens.linux.native import lib_dir
from pagelens.vm.closing import Closing
from pagelens.vm.errors import CapabilityMissingError

_LIBRARIES = ("libbpf.so.1", "libbpf.so")
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
BPF_MAP_TYPE_RINGBUF = 27
_BTF_KIND_TYPEDEF = 8
_S = TypeVar("_S", bound=ctypes.Structure)


def object_path() -> Path:
    """Where the compiled object is installed (beside the C core)."""
    return lib_dir() / "recorder.bpf.o"


_lib: ctypes.CDLL | None = None


def _libbpf() -> ctypes.CDLL:
    global _lib  # noqa: PLW0603 - one library handle per process
    if _lib is not None:
        return _lib
    for name in _LIBRARIES:
        try:
            lib = ctypes.CDLL(name, use_errno=True)
            break
        except OSError:
            continue
    else:
        raise CapabilityMissingError(
            "libbpf is not installed", capability="bpf", fix="sudo apt-get install -y libbpf1"
        )
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "bpf_object__open_file": (pointer, [text, pointer]),
        "bpf_object__load": (integer, [pointer]),
        "bpf_object__close": (None, [pointer]),
        "bpf_object__next_program": (pointer, [pointer, pointer]),
        "bpf_object__find_map_by_name": (pointer, [pointer, text]),
        "bpf_program__name": (text, [pointer]),
        "bpf_program__section_name": (text, [pointer]),
        "bpf_program__set_autoload": (integer, [pointer, ctypes.c_bool]),
        "bpf_program__fd": (integer, [pointer]),
        "bpf_program__attach": (pointer, [pointer]),
        "bpf_program__attach_perf_event": (pointer, [pointer, integer]),
        "bpf_link__destroy": (integer, [pointer]),
        "bpf_link__fd": (integer, [pointer]),
        "bpf_iter_create": (integer, [integer]),
        "bpf_map__fd": (integer, [pointer]),
        "bpf_map__set_max_entries": (integer, [pointer, ctypes.c_uint32]),
        "bpf_map__initial_value": (pointer, [pointer, ctypes.POINTER(ctypes.c_size_t)]),
        "bpf_map_create": (
            integer,
            [integer, text, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, pointer],
        ),
        "bpf_map_update_elem": (integer, [integer, pointer, pointer, ctypes.c_uint64]),
        "bpf_map_lookup_elem": (integer, [integer, pointer, pointer]),
        "btf__load_vmlinux_btf": (pointer, []),
        "btf__find_by_name_kind": (ctypes.c_int32, [pointer, text, ctypes.c_uint32]),
        "btf__free": (None, [pointer]),
        "libbpf_set_print": (pointer, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    _lib = lib
    return lib


class _Log:
    """libbpf's messages, kept for the error text instead of being printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._libc = ctypes.CDLL(None)
        self._libc.vsnprintf.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_void_p,
        ]
        self.callback = _PRINT(self._print)

    def _print(self, level: int, form: bytes, args: int) -> int:
        if level <= 1:
            buffer = ctypes.create_string_buffer(1 << 20)
            self._libc.vsnprintf(buffer, 1 << 20, form, args)
            self.lines.append(buffer.value.decode(errors="replace").rstrip())
        return 0


_log: _Log | None = None


class BpfObject(Closing):
    """One loaded object. Closing it detaches everything: links die with their descriptors, so a killed
    recorder leaves nothing in the kernel."""

    def __init__(self, path: Path | None = None) -> None:
        global _log  # noqa: PLW0603 - libbpf has one print callback per process
        lib = _libbpf()
        if _log is None:
            _log = _Log()
            lib.libbpf_set_print(ctypes.cast(_log.callback, ctypes.c_void_p))
        _log.lines.clear()
        path = path or object_path()
        if not path.exists():
            raise CapabilityMissingError(
                "the BPF object was not built",
                capability="bpf",
                fix="sudo apt-get install -y clang libbpf-dev && ./dev build",
            )
        self._lib = lib
        self._links: list[int] = []
        self._object: int | None = lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise _missing("the BPF object cannot be opened", ctypes.get_errno())
        self.programs: dict[str, int] = {}
        self.sections: dict[str, str] = {}
        program = None
        while program := lib.bpf_object__next_program(self._object, program):
            name = lib.bpf_program__name(program).decode()
            self.programs[name] = program
            self.sections[name] = lib.bpf_program__section_name(program).decode()
        self.loaded: set[str] = set(self.programs)

    def select(self, wanted: Iterable[str]) -> list[str]:
        """Load only these programs, and of them only those whose tracepoint this kernel has.

        Returns the names of those that it lacks. CapabilityMissingError without BTF.
        """
        wanted = set(wanted)
        btf = self._lib.btf__load_vmlinux_btf()
        if not btf:
            raise CapabilityMissingError("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)", capability="btf")
        absent = []
        for name, program in self.programs.items():
            section = self.sections[name]
            there = True
            if section.startswith("tp_btf/"):
                symbol = f"btf_trace_{section.removeprefix('tp_btf/')}"
                there = self._lib.btf__find_by_name_kind(btf, symbol.encode(), _BTF_KIND_TYPEDEF) > 0
            if name in wanted and not there:
                absent.append(name)
            if name not in wanted or not there:
                self._lib.bpf_program__set_autoload(program, False)
                self.loaded.discard(name)
        self._lib.btf__free(btf)
        return absent

    def set_max_entries(self, map_name: str, entries: int) -> None:
        """Before the load."""
        self._lib.bpf_map__set_max_entries(self._map(map_name), entries)

    def initial(self, map_name: str, kind: type[_S]) -> _S:
        """The initial bytes of a data section, before the load, as a ctypes structure in place."""
        size = ctypes.c_size_t()
        address = self._lib.bpf_map__initial_value(self._map(map_name), ctypes.byref(size))
        if not address or size.value < ctypes.sizeof(kind):
            raise CapabilityMissingError(
                "the BPF object is of another version than this package", capability="bpf", fix="./dev build"
            )
        return kind.from_address(address)

    def shared(self, map_name: str, kind: type[_S]) -> _S:
        """A data section after the load, mapped: what the programs write shows at once."""
        return kind.from_buffer(mmap.mmap(self.map_fd(map_name), ctypes.sizeof(kind)))

    def load(self) -> None:
        """Relocate, verify, load. CapabilityMissingError with the kernel's reason."""
        if self._lib.bpf_object__load(self._object):
            raise _missing("the kernel refuses the BPF programs", ctypes.get_errno())

    def map_fd(self, name: str) -> int:
        """Descriptor of a map."""
        return int(self._lib.bpf_map__fd(self._map(name)))

    def attach(self, name: str) -> None:
        """Attach a tracepoint program."""
        self._keep(name, self._lib.bpf_program__attach(self.programs[name]))

    def attach_perf(self, name: str, fd: int) -> None:
        """Attach a perf_event program to an open event. The descriptor is the link's from now on: libbpf closes
        it with the link (bpf_link_perf_detach); closing it here too would later close somebody else's file."""
        try:
            self._keep(name, self._lib.bpf_program__attach_perf_event(self.programs[name], fd))
        except BaseException:
            os.close(fd)
            raise

    def prepare_iterator(self, name: str) -> int:
        """Attach an iterator program, for `run_iterator`: nothing runs until that reads. The link's descriptor."""
        link = self._lib.bpf_program__attach(self.programs[name])
        if not link:
            raise _missing(f"the BPF iterator {name} cannot be attached", ctypes.get_errno())
        self._links.append(link)
        return int(self._lib.bpf_link__fd(link))

    def run_iterator(self, link: int) -> bytes:
        """Run an iterator program once and return what it wrote. link: of `prepare_iterator`."""
        fd = self._lib.bpf_iter_create(link)
        if fd < 0:
            raise _missing("the BPF iterator cannot be read", ctypes.get_errno())
        with open(fd, "rb", buffering=0) as stream:
            return stream.readall()

    def read_iterator(self, name: str) -> bytes:
        """The same, of a program that is run this once."""
        link = self._lib.bpf_program__attach(self.programs[name])
        if not link:
            raise _missing(f"the BPF iterator {name} cannot be attached", ctypes.get_errno())
        try:
            return self.run_iterator(self._lib.bpf_link__fd(link))
        finally:
            self._lib.bpf_link__destroy(link)

    def skipped(self) -> dict[str, int]:
        """How often each loaded program did not run although its event came, because it was running on that CPU
        already: preempted there, since tracepoints may be (7.0). Source: bpf_prog_show_fdinfo, 5.12."""
        found = {}
        for name in self.loaded:
            fd = self._lib.bpf_program__fd(self.programs[name])
            text = Path(f"/proc/self/fdinfo/{fd}").read_text() if fd >= 0 else ""
            line = next((x for x in text.splitlines() if x.startswith("recursion_misses:")), ":0")
            found[name] = int(line.partition(":")[2])
        return found

    def _keep(self, name: str, link: int | None) -> None:
        if not link:
            raise _missing(f"the BPF program {name} cannot be attached", ctypes.get_errno())
        self._links.append(link)

    def _map(self, name: str) -> int:
        found = self._lib.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise RuntimeError(f"no map {name} in the BPF object")
        return int(found)

    def detach(self) -> None:
        """Detach all programs; the maps stay readable."""
        for link in self._links:
            self._lib.bpf_link__destroy(link)
        self._links.clear()

    def close(self) -> None:
        """Detach and free."""
        self.detach()
        if self._object:
            self._lib.bpf_object__close(self._object)
            self._object = None


def create_ring(size: int) -> int:
    """A ring buffer map of `size` bytes (a power of two, at least a page); returns its descriptor."""
    fd = int(_libbpf().bpf_map_create(BPF_MAP_TYPE_RINGBUF, b"pl_ring", 0, 0, size, None))
    if fd < 0:
        raise _missing(f"a ring of {size} bytes cannot be made", ctypes.get_errno())
    return fd


def map_update(fd: int, key: Any, value: Any) -> None:
    """Store ctypes values. OSError where the kernel refuses."""
    if _libbpf().bpf_map_update_elem(fd, ctypes.byref(key), ctypes.byref(value), 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def map_lookup(fd: int, key: Any, value: Any) -> bool:
    """Read into a ctypes value; False if there is no such key."""
    if not _libbpf().bpf_map_lookup_elem(fd, ctypes.byref(key), ctypes.byref(value)):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOENT, errno.ESRCH):
        return False
    raise OSError(code, os.strerror(code))


def _missing(what: str, code: int) -> CapabilityMissingError:
    reason = os.strerror(code) if code else "no reason given"
    detail = ""
    # EACCES is also what the verifier gives for a program that it does not like: then its log says why.
    refused = code in (errno.EPERM, errno.EACCES) and not any(
        "LOAD LOG" in x for x in (_log.lines if _log else ())
    )
    if _log and _log.lines and not refused:
        last = [line for text in _log.lines[-4:] for line in text.splitlines()[-4:]]
        detail = "; " + " | ".join(last)[-300:]
    fix = "run as root, or: sudo setcap cap_bpf,cap_perfmon+ep on the interpreter" if refused else ""
    return CapabilityMissingError(f"{what}: {reason}{detail}", capability="bpf", fix=fix)
