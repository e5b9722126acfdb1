"""`Checkpoint`: save a process in memory, roll it back thousands of times a second.

    with Checkpoint.take(pid) as point:
        while fuzzing:
            ...                     # let the process do something
            point.rollback()        # it is back where it was

For fuzzing, simulation and tests; no kernel module. Written pages are known from asynchronous write
protection (userfaultfd made in the target, PAGEMAP_SCAN; Linux 6.7), so a rollback costs what was written,
not what is mapped. A changed vma list is undone by the general way (`rollback`), and the fast way goes on
afterwards.

What it does not see: writes to shared memory through another mapping (another process, write(2)); shared
memory is rolled back as far as this process wrote it, and not at all where others mapped it at `take` (unless
accepted). `watch` looks at descriptors, offsets, children
before each rollback (about 20 µs a descriptor); without it only threads and mappings are. Between rollbacks
the target is not traced; if pagelens dies, the kernel drops the write protection.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.checkpoint import concerns
from pagelens.checkpoint import plan as plans
from pagelens.checkpoint.image import Kind, per_page
from pagelens.checkpoint.memory import InMemory, capture
from pagelens.checkpoint.rollback import rollback_held
from pagelens.checkpoint.state import children, identities, open_files, prepare
from pagelens.linux import mappers, pagecopy, pagescan
from pagelens.linux.hold import Held
from pagelens.linux.inject import take_userfaultfd
from pagelens.linux.native import library
from pagelens.linux.procfs import Process
from pagelens.linux.ptrace import UserRegs
from pagelens.linux.restart import restartable
from pagelens.linux.userfault import Feature, Mode, Userfault
from pagelens.vm.closing import Closing
from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError, UsageError
from pagelens.vm.pages import PageState
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Prot, Vma

_FILE, _POPULATED = np.uint32(PageState.FILE), np.uint32(PageState.PRESENT | PageState.SWAPPED)
_REGIONS = 1 << 20  # 24 MiB of address space, touched as far as a scan needs it
_WHY = ("", "threads", "maps", "hold", "scan", "write", "registers", "gone", "shared")
_MAP = np.dtype([(n, np.uint64) for n in ("start", "end", "flags", "offset", "inode", "dev")])
_SAVED = np.dtype([(n, np.uint64) for n in ("start", "end", "offset")])
_SPAN = np.dtype([(n, np.uint64) for n in ("start", "end", "kind")])
_ANONYMOUS, _SHARED, _PRIVATE_FILE, _SHARED_OTHERS = range(4)
_NO_DATA, _OF_FILE = np.uint64(2**64 - 1), np.uint64(1)


class _Fast(ctypes.Structure):
    _fields_ = (
        *(
            (n, ctypes.c_int32)
            for n in ("pid", "maps_fd", "pagemap_fd", "mem_fd", "task_fd", "accept_shared")
        ),
        *((n, ctypes.c_uint64) for n in ("n_threads", "n_maps", "n_saved", "n_spans", "xstate_size")),
        *((n, ctypes.c_uint64) for n in ("guard_known", "guard_pages")),
        *(
            (n, ctypes.c_void_p)
            for n in (
                "tids",
                "regs",
                "xstate",
                "xstate_len",
                "sigmask",
                "maps",
                "saved",
                "spans",
                "data",
                "regions",
            )
        ),
        ("n_regions", ctypes.c_uint64),
        *(
            (n, ctypes.c_uint64)
            for n in ("written", "zeroed", "hold_ns", "stop_ns", "check_ns", "scan_ns", "write_ns", "arm_ns")
        ),
        ("error", ctypes.c_int32),
        ("why", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Back:
    """One rollback: pages written, how long the target was held (ns), and whether it took the fast way."""

    written_pages: int
    held_ns: int
    fast: bool


class Checkpoint(Closing):
    """A process as it was at `take`. Context manager; `close` ends the tracking.

    Any thread may call; calls wait for each other. When the process dies, also in the middle of a call, they
    raise TargetGoneError, and what was saved can still be read and written to disk. After `close`: UsageError.
    If the process is a child of this one, no other thread may wait for it during a call (Popen.poll, Popen.kill):
    that wait would take the stop for itself.
    """

    def __init__(self, proc: Process, *, watch: bool) -> None:
        self.pid = proc.pid
        self.watch = watch
        self.rollbacks = 0
        self._proc = proc
        self._lock = threading.RLock()
        self._uffd: Userfault | None = None
        self._mem: pagecopy.MemoryFile | None = None
        self._fds: list[int] = []
        self._keep: dict[str, Any] = {}  # numpy buffers that the C side points into
        self._fast = _Fast()
        self._image: InMemory | None = None
        self._children: tuple[int, ...] = ()

    @classmethod
    def take(cls, pid: int, *, watch: bool = True) -> Checkpoint:
        """Save process `pid` now. Raises UsageError, TargetGoneError, CapabilityMissingError (no userfaultfd
        WP_ASYNC or PAGEMAP_SCAN: Linux 6.7; no PROCMAP_QUERY: 6.11)."""
        prepare()
        proc = Process.open(pid)
        point = cls(proc, watch=watch)
        try:
            point._uffd, _ = take_userfaultfd(proc)
            point._uffd.handshake(Feature.WP_ASYNC | Feature.WP_UNPOPULATED)
            point._mem = pagecopy.MemoryFile(pid, write=True)
            point._fds = [proc.fd(name) for name in ("maps", "pagemap", "task")]
            point._save()
        except BaseException:
            point.close()
            raise
        return point

    # -- saving

    def _save(self) -> None:
        assert self._mem is not None
        held = Held(self.pid)
        with held:
            self._image = capture(self._proc, held, self._mem, to_write=True)
            vmas, state = self._image.vmas, self._image.process
            self._track(list(vmas))
        self._image.process = replace(state, backing=identities(self._proc, vmas))
        self._mark_shared()

    def _track(self, vmas: list[Vma]) -> None:
        # Register, prepare the tables of the C side, arm. The target is held.
        assert self._image is not None
        assert self._uffd is not None
        assert self._mem is not None
        spans: list[tuple[int, int, int]] = []
        for vma in vmas:
            if not _tracked(vma):
                continue
            try:
                # Droppable memory cannot be watched: what is there always counts as written.
                if "dp" not in (vma.vm_flags or ()):
                    self._uffd.register(vma.start, vma.end, Mode.WP)
            except OSError as error:
                if not self._proc.alive:
                    raise TargetGoneError(f"process {self.pid} is gone") from None
                raise CapabilityMissingError(
                    f"{vma} of process {self.pid} cannot be write-protected ({error.strerror})",
                    capability="uffd-wp-async",
                ) from None
            kind = _SHARED if vma.shared else _PRIVATE_FILE if vma.inode else _ANONYMOUS
            if spans and spans[-1][1:] == (vma.start, kind) and kind != _SHARED:
                spans[-1] = (spans[-1][0], vma.end, kind)
            else:
                spans.append((vma.start, vma.end, kind))
        image, fast, keep = self._image, self._fast, self._keep
        span = np.array(spans, np.uint64).reshape(-1, 3)
        keep["spans"] = np.ascontiguousarray(span).view(_SPAN).reshape(-1)
        keep["saved"] = _saved(image, span)
        keep["maps"] = self._maps()
        threads = image.process.threads
        keep["tids"] = np.array([t.tid for t in threads], np.int32)
        regs = (UserRegs * len(threads))(*[restartable(UserRegs.from_dict(t.regs)) for t in threads])
        size = max(len(t.xstate) for t in threads)
        keep["regs"] = regs
        keep["xstate"] = np.frombuffer(b"".join(t.xstate.ljust(size, b"\0") for t in threads), np.uint8)
        keep["xstate_len"] = np.array([len(t.xstate) for t in threads], np.uint32)
        keep["sigmask"] = np.array([t.sigmask for t in threads], np.uint64)
        keep["data"] = image.data
        keep["regions"] = np.zeros(_REGIONS * 3, np.uint64)
        fast.pid, fast.maps_fd, fast.pagemap_fd, fast.mem_fd = self.pid, *self._fds[:2], self._mem.fd
        fast.task_fd = self._fds[2]
        fast.n_threads, fast.n_maps = len(threads), len(keep["maps"])
        fast.n_saved, fast.n_spans, fast.xstate_size = len(keep["saved"]), len(spans), size
        fast.n_regions = _REGIONS
        for name in ("tids", "xstate", "xstate_len", "sigmask", "maps", "saved", "spans", "data", "regions"):
            setattr(fast, name, keep[name].ctypes.data if len(keep[name]) else 0)
        fast.regs = ctypes.addressof(regs)
        lib = _lib()
        fast.guard_known = int(bool(pagescan.supported() & pagescan.Category.GUARD))
        fast.guard_pages = lib.pl_fast_guards(ctypes.byref(fast)) if fast.guard_known else 0
        result = lib.pl_fast_arm(ctypes.byref(fast))
        if result and not self._proc.alive:
            raise TargetGoneError(f"process {self.pid} is gone")
        if result:
            raise CapabilityMissingError(
                f"write protection of process {self.pid} failed ({os.strerror(-result)})",
                capability="uffd-wp-async",
                fix="boot Linux 6.7 or later",
            )

    def _mark_shared(self) -> None:
        # Not while it is held: all processes' maps take milliseconds.
        assert self._image is not None
        shared = [v for v in self._image.vmas if v.shared and _tracked(v)]
        keys = {v.start: (v.dev, v.inode) for v in shared}
        who = mappers.others(self.pid, {(v.dev, v.inode): v.name for v in shared})
        spans = self._keep["spans"]
        for row in np.flatnonzero(spans["kind"] == _SHARED).tolist():
            if keys[int(spans["start"][row])] in who:
                spans["kind"][row] = _SHARED_OTHERS

    def _maps(self) -> Any:
        for room in (1024, 70_000):
            out = np.zeros(room, _MAP)
            found = _lib().pl_maps(self._fds[0], out.ctypes.data, room)
            if found >= 0:
                return out[:found].copy()
        raise CapabilityMissingError(
            "this kernel has no PROCMAP_QUERY", capability="procmap-query", fix="boot Linux 6.11 or later"
        )

    # -- going back

    def rollback(self, *, accept: Collection[str] = ()) -> Back:
        """The process is as it was at `take`. accept: kinds of concerns.KINDS not to refuse.

        Raises UsageError (what memory cannot bring back; nothing was touched), TargetGoneError.
        """
        with self._lock:
            return self._rollback(accept)

    def _saved(self) -> InMemory:
        if self._image is None:
            raise UsageError("the checkpoint is closed")
        return self._image

    def _rollback(self, accept: Collection[str]) -> Back:
        self._saved()
        if self.watch:
            self._look(accept)
        fast = self._fast
        fast.accept_shared = int("shared" in accept)
        why = _WHY[_lib().pl_fast_rollback(ctypes.byref(fast))]
        if not why:
            self.rollbacks += 1
            return Back(fast.written + fast.zeroed, fast.hold_ns, True)
        if not self._proc.alive:
            raise TargetGoneError(f"process {self.pid} is gone")
        if why in ("threads", "maps", "hold"):
            return self._slowly(accept)
        if why == "shared":
            raise UsageError(
                f"process {self.pid} cannot be rolled back: it wrote to shared memory that other processes map too, "
                "or have open: it would change there [shared]"
            )
        raise PagelensError(
            f"process {self.pid} is partly rolled back ({why}: {os.strerror(fast.error)}): end it"
        )

    def _look(self, accept: Collection[str]) -> None:
        assert self._image is not None
        saved = self._image.process
        now = replace(saved, files=open_files(self._proc), children=children(self._proc))
        found = [c for c in concerns.compare(saved, now)[0] if c.kind not in accept]
        if not self._proc.alive:  # a dying process closes its descriptors first
            raise TargetGoneError(f"process {self.pid} is gone")
        if found:
            raise UsageError(
                f"process {self.pid} cannot be rolled back: " + "; ".join(concerns.listed(found))
            )

    def _slowly(self, accept: Collection[str]) -> Back:
        assert self._image is not None
        assert self._mem is not None
        held = Held(self.pid)
        with held:
            job = rollback_held(self._proc, held, self._mem, self._image, accept)
            self._track(list(self._image.vmas))
        self._mark_shared()
        self.rollbacks += 1
        return Back(job.written + job.dropped, held.held_ns, False)

    def read(self, addr: int, length: int) -> bytes:
        """Saved contents. KeyError where there are none."""
        image = self._saved()
        first, last = addr // PAGE_SIZE, -(-(addr + length) // PAGE_SIZE)
        pages = np.arange(first, last, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        where = image.locate(pages)
        known = np.isin(where.kind, (Kind.DATA, Kind.ZERO))
        if not known.all():
            raise KeyError(f"{int(pages[~known][0]):#x} has no saved contents")
        skip = addr - first * PAGE_SIZE
        out: bytes = image.contents(where).tobytes()[skip : skip + length]
        return out

    def save(self, out: Path | str, *, level: int = 1, force: bool = False) -> Path:
        """Write it as a checkpoint directory. Errors as `dump`."""
        from pagelens.checkpoint.dump import save

        with self._lock:
            return save(self._saved(), Path(out), level=level, force=force)

    def close(self) -> None:
        """End the tracking. The process stays as it is; twice is harmless."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._uffd is not None:
            self._uffd.close()
        if self._mem is not None:
            self._mem.__exit__()
            self._mem = None
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._image = None
        self._proc.close()


def _tracked(vma: Vma) -> bool:
    # What can be written without a change of the vma list; read-only private anonymous memory included, since
    # mprotect there and back leaves the list as it was.
    if plans.is_special(vma) or vma.name == "[vdso]":
        return False
    if vma.shared:
        return bool(vma.prot & Prot.WRITE)
    return not vma.inode or bool(vma.prot & Prot.WRITE)


def _saved(image: InMemory, spans: Any) -> Any:
    # The C side's rows, cut to the watched spans: address, end, offset of the contents.
    flat = per_page(image.rows)
    flat = flat[np.isin(flat["kind"], (Kind.DATA, Kind.ZERO))]
    index = np.searchsorted(spans[:, 0], flat["start"], side="right").astype(np.int64) - 1
    inside = (
        (index >= 0) & (flat["start"] < spans[np.maximum(index, 0), 1]) if len(spans) else np.zeros(0, bool)
    )
    flat = flat[inside]
    offset = flat["first"].astype(np.uint64) * np.uint64(PAGE_SIZE)
    of_file = ((flat["state"] & _FILE) != 0) | ((flat["state"] & _POPULATED) == 0)
    offset[of_file & (spans[index[inside], 2] == _PRIVATE_FILE)] |= _OF_FILE
    offset[flat["kind"] == Kind.ZERO] = _NO_DATA
    out = np.zeros(len(flat), _SAVED)
    out["start"], out["end"], out["offset"] = flat["start"], flat["start"] + np.uint64(PAGE_SIZE), offset
    if len(out) < 2:
        return out
    page = np.uint64(PAGE_SIZE)  # offsets that follow each other agree about _OF_FILE
    joins = (out["end"][:-1] == out["start"][1:]) & (
        ((out["offset"][:-1] == _NO_DATA) & (out["offset"][1:] == _NO_DATA))
        | ((out["offset"][:-1] != _NO_DATA) & (out["offset"][:-1] + page == out["offset"][1:]))
    )
    # A row must not cross the border of two spans: each span walks its own rows.
    span_of = np.searchsorted(spans[:, 0], out["start"], side="right")
    joins &= span_of[:-1] == span_of[1:]
    first = np.flatnonzero(np.concatenate(([True], ~joins)))
    last = np.concatenate((first[1:], [len(out)])) - 1
    rows = out[first]
    rows["end"] = out["end"][last]
    return rows


def _lib() -> Any:
    lib = library()
    if not hasattr(lib, "_pl_fast_ready"):
        lib.pl_maps.restype = ctypes.c_long
        lib.pl_maps.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64]
        lib.pl_fast_guards.restype = ctypes.c_uint64
        for name in ("pl_fast_guards", "pl_fast_arm"):
            getattr(lib, name).argtypes = [ctypes.c_void_p]
        lib.pl_fast_rollback.argtypes = [ctypes.c_void_p]
        lib._pl_fast_ready = True  # type: ignore[attr-defined]
    return lib
