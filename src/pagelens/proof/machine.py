"""What a proof does on the machine that its child runs on: this one, or another one (`proof.distant`).

Everything that touches the kernel under proof goes through these few methods, with plain values only, so that the
same oracle drives a child here or in a virtual machine. Descriptors and handles are numbers of that machine.

Rejected: the whole proof inside the virtual machine. Under emulation Python is seventy times slower, and of an
operation's time nine tenths are the model and the comparison, which need no kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import resource
import select
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

import pagelens
from pagelens.linux.disk import sync
from pagelens.linux.frames import lookup
from pagelens.linux.procfs import Process
from pagelens.linux.settings import user_space_end
from pagelens.model.world import Span
from pagelens.proof import disk, fences
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.units import PAGE_SIZE, TASK_SIZE

# Milliseconds for an answer: on a machine with thirty waiting for two CPUs, ten seconds are few.
PATIENCE = 60_000
_LAST = b"[vsyscall]\n"  # the gate area ends maps, where the kernel has it


# Maps, pagemap, and the spans (address, pages) that were read last, whose entries are wanted if maps is as it was.
Want = tuple[int, int, Sequence[Span]]
# Text of maps, or None: as last time, and entries of the spans, or None: as last time.
Look = tuple[bytes | None, bytes | None]


class Machine(Protocol):
    """A kernel that a child of the oracle runs on."""

    def facts(self) -> dict[str, int | str]:
        """release, memory_pages, levels of page tables, limits (memlock, stack, data, address_space: bytes, 2^63
        unlimited) and settings."""

    def pin(self) -> list[int]:
        """Keep the calling thread, and so the child, on one CPU, if asked for; the CPUs it had before."""

    def unpin(self, cpus: list[int]) -> None:
        """Undo `pin`."""

    def pinned(self, pid: int) -> tuple[bool, str]:
        """(whether `pid` is where `pin` put it, which CPU that is)."""

    def disk(self, pages: int) -> str:
        """A new file of zeros on disk, all of it in the page cache as single pages, and written back: its path, of 15
        bytes at most. CapabilityMissingError where /var/tmp is no disk."""

    def unlink(self, path: str) -> None:
        """Remove what `disk` made; whoever has it open keeps it."""

    def spawn(self, slots: int) -> tuple[int, list[tuple[int, int]]]:
        """Start a child with `slots` pairs of pipes: (pid, [(to write commands to, to read replies from)])."""

    def open(self, pid: int) -> tuple[int, int, int]:
        """(handle of /proc/PID, its maps, its pagemap)."""

    def shut(self, handle: int, fds: Iterable[int]) -> None:
        """Close what `open` gave."""

    def tell(self, fd: int, command: bytes) -> None:
        """Send a command."""

    def answer(self, fd: int, size: int) -> bytes | None:
        """A reply of `size` bytes; shorter where the child is gone, None where it does not answer."""

    def ask(
        self, to: int, command: bytes, fd: int, size: int, wants: Sequence[Want]
    ) -> tuple[bytes | None, list[Look]]:
        """`tell`, then `answer`, then `look`: at another machine, each request has its price."""

    def look(self, wants: Sequence[Want]) -> list[Look]:
        """How processes look now."""

    def ready(self, fds: Sequence[int]) -> list[int]:
        """Those that can be read, once one can."""

    def maps(self, fd: int) -> bytes:
        """All of maps."""

    def pagemap(self, fd: int, spans: Sequence[Span]) -> bytes:
        """uint64 entries of spans (address, pages), one after the other; shorter where one is cut off."""

    def frames(self, pfns: bytes) -> tuple[bytes, bytes]:
        """(kpagecount, kpageflags) of uint64 frames; CapabilityMissingError without privilege."""

    def read(self, handle: int, name: str) -> bytes:
        """The whole of /proc/PID/name."""

    def write(self, handle: int, name: str, data: bytes) -> int:
        """Write into /proc/PID/name: 0 or -errno."""

    def ended(self, handle: int, tid: int) -> bool:
        """Whether a thread ends while we are patient."""

    def limit(self, pid: int, which: int, soft: int) -> int:
        """prlimit of the soft limit, within the hard one (-1: none): 0 or -errno."""

    def remote(self, pid: int, addr: int, length: int, write: bool) -> int:
        """process_vm_readv or process_vm_writev (zeros): bytes or -errno."""

    def kill(self, pids: Iterable[int]) -> None:
        """Kill and reap."""

    def reap(self, pid: int) -> None:
        """Wait for a child that ends."""

    def fate(self, pid: int) -> str:
        """How a child that we have lost has ended; reaps it."""

    def close_pipes(self, pipes: Iterable[tuple[int, int]]) -> None:
        """Close what `spawn` gave."""

    def fences(self, handle: int, local: bool) -> list[tuple[str, bool, str]]:
        """`proof.fences.of_process`."""


class Local:
    """This machine. cpu: where children are pinned (one CPU, so that the kernel's per-CPU batches are a child's own),
    and the calling thread with them: on a busy machine a pipe between two CPUs is twenty times slower. None: neither.
    """

    def __init__(self, cpu: int | None = None) -> None:
        self.cpu = cpu
        self._processes: dict[int, Process] = {}
        self._handles = 0
        self._texts: dict[int, bytes] = {}  # what was said last, by descriptor
        self._entries: dict[int, tuple[Sequence[Span], bytes]] = {}

    def facts(self) -> dict[str, int | str]:
        return {
            "release": platform.release(),
            "memory_pages": os.sysconf("SC_PHYS_PAGES"),
            "levels": 5 if user_space_end() > TASK_SIZE else 4,
            "memlock": _limit(resource.RLIMIT_MEMLOCK),
            "stack": _limit(resource.RLIMIT_STACK),
            "data": _limit(resource.RLIMIT_DATA),
            "address_space": _limit(resource.RLIMIT_AS),
            "max_map_count": fences.figure("/proc/sys/vm/max_map_count", 65530),
            "dac_min_addr": fences.figure("/proc/sys/vm/mmap_min_addr", 0x1_0000),
            "disk_aligns": disk.aligns(),
            "overcommit": fences.figure("/proc/sys/vm/overcommit_memory", 0),
        }

    def pin(self) -> list[int]:
        before = sorted(os.sched_getaffinity(0))
        if self.cpu is not None:
            os.sched_setaffinity(0, {self.cpu})
        return before

    def unpin(self, cpus: list[int]) -> None:
        os.sched_setaffinity(0, cpus)

    def pinned(self, pid: int) -> tuple[bool, str]:
        return self.cpu is None or os.sched_getaffinity(pid) == {self.cpu}, str(self.cpu)

    def disk(self, pages: int) -> str:
        return disk.make(pages)

    def unlink(self, path: str) -> None:
        Path(path).unlink()

    def spawn(self, slots: int) -> tuple[int, list[tuple[int, int]]]:
        path = _written_back(str(oracle_path()))
        pipes: list[tuple[int, int]] = []
        actions: list[tuple[int, ...]] = []
        theirs: list[int] = []
        try:
            for slot in range(slots):
                command_r, command_w = os.pipe()
                reply_r, reply_w = os.pipe()
                pipes.append((command_w, reply_r))
                # Through a high number first: 100 and up may be in use here.
                theirs += [_above(command_r, 200), _above(reply_w, 200)]
                actions += [(os.POSIX_SPAWN_DUP2, fd, 100 + 2 * slot + i) for i, fd in enumerate(theirs[-2:])]
            return os.posix_spawn(path, [path], {}, file_actions=actions), pipes
        except BaseException:
            self.close_pipes(pipes)
            raise
        finally:
            for fd in theirs:
                os.close(fd)

    def open(self, pid: int) -> tuple[int, int, int]:
        process = Process.open(pid)
        self._handles += 1
        self._processes[self._handles] = process
        return self._handles, process.fd("maps"), process.fd("pagemap")

    def shut(self, handle: int, fds: Iterable[int]) -> None:
        for fd in fds:
            os.close(fd)
            self._texts.pop(fd, None)
            self._entries.pop(fd, None)
        self._processes.pop(handle).close()

    def tell(self, fd: int, command: bytes) -> None:
        os.write(fd, command)

    def answer(self, fd: int, size: int) -> bytes | None:
        return os.read(fd, size) if self.ready([fd]) else None

    def ask(
        self, to: int, command: bytes, fd: int, size: int, wants: Sequence[Want]
    ) -> tuple[bytes | None, list[Look]]:
        try:
            os.write(to, command)
        except BrokenPipeError:
            return b"", []
        reply = self.answer(fd, size)
        return reply, self.look(wants) if reply is not None and len(reply) == size else []

    def look(self, wants: Sequence[Want]) -> list[Look]:
        return [self._look(*want) for want in wants]

    def _look(self, maps_fd: int, pagemap_fd: int, spans: Sequence[Span]) -> Look:
        text = self.maps(maps_fd)
        if text != self._texts.get(maps_fd):
            self._texts[maps_fd] = text
            return text, None
        last = self._entries.get(pagemap_fd)
        now = spans, self.pagemap(pagemap_fd, spans)
        self._entries[pagemap_fd] = now
        return None, None if now == last else now[1]

    def ready(self, fds: Sequence[int]) -> list[int]:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        return [fd for fd, _ in poll.poll(PATIENCE)]

    def maps(self, fd: int) -> bytes:
        data = os.pread(fd, 1 << 16, 0)
        while not data.endswith(_LAST):
            more = os.pread(fd, 1 << 16, len(data))
            if not more:
                break
            data += more
        return data

    def pagemap(self, fd: int, spans: Sequence[Span]) -> bytes:
        self._entries.pop(fd, None)
        return b"".join([os.pread(fd, pages * 8, start // PAGE_SIZE * 8) for start, pages in spans])

    def frames(self, pfns: bytes) -> tuple[bytes, bytes]:
        numbers = np.frombuffer(pfns, np.uint64)
        return lookup("kpagecount", numbers)[0].tobytes(), lookup("kpageflags", numbers)[0].tobytes()

    def read(self, handle: int, name: str) -> bytes:
        return self._processes[handle].read(name)

    def write(self, handle: int, name: str, data: bytes) -> int:
        fd = self._processes[handle].fd(name, os.O_WRONLY)
        try:
            os.write(fd, data)
        except OSError as exc:
            return -(exc.errno or errno.EIO)
        finally:
            os.close(fd)
        return 0

    def ended(self, handle: int, tid: int) -> bool:
        deadline = time.monotonic() + PATIENCE / 1000
        while tid in self._processes[handle].tasks():
            if time.monotonic() > deadline:
                return False
            time.sleep(0)
        return True

    def limit(self, pid: int, which: int, soft: int) -> int:
        hard = resource.prlimit(pid, which)[1]
        try:
            resource.prlimit(pid, which, (soft, hard))
        except (OSError, ValueError):
            return -errno.EPERM
        return 0

    def remote(self, pid: int, addr: int, length: int, write: bool) -> int:
        buffer = ctypes.create_string_buffer(max(length, 1))
        ours, theirs = _Vector(ctypes.addressof(buffer), length), _Vector(addr, length)
        libc = _libc()
        function = libc.process_vm_writev if write else libc.process_vm_readv
        function.restype = ctypes.c_ssize_t
        done: int = function(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        return done if done >= 0 else -ctypes.get_errno()

    def kill(self, pids: Iterable[int]) -> None:
        pids = list(pids)
        for pid in pids:
            os.kill(pid, 9)
        for pid in pids:
            os.waitpid(pid, 0)

    def reap(self, pid: int) -> None:
        os.waitpid(pid, 0)

    def fate(self, pid: int) -> str:
        try:
            status = os.waitpid(pid, 0)[1]
        except ChildProcessError:
            return "reaped already"
        if os.WIFSIGNALED(status):
            return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"exit code {os.waitstatus_to_exitcode(status)}"

    def close_pipes(self, pipes: Iterable[tuple[int, int]]) -> None:
        for fd in (fd for pair in pipes for fd in pair):
            with contextlib.suppress(OSError):
                os.close(fd)

    def fences(self, handle: int, local: bool) -> list[tuple[str, bool, str]]:
        found = fences.of_process(self._processes[handle], local=local)
        return [(fence.name, fence.ok, fence.how) for fence in found]


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def oracle_path() -> Path:
    """Where the child's program is. CapabilityMissingError where it was not built."""
    directory = os.environ.get("PAGELENS_LIB_DIR") or str(Path(pagelens.__file__).parent / "_lib")
    path = Path(directory) / "pl-oracle"
    if not path.exists():
        raise CapabilityMissingError(
            "the oracle child is not built", capability="oracle", fix="./dev build (needs gcc and meson)"
        )
    return path


@functools.cache
def _written_back(path: str) -> str:
    # Pages of a program that was just built are dirty, and smaps says so of whoever maps them.
    sync(path)
    return path


def _above(fd: int, least: int) -> int:
    import fcntl

    new = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(fd)
    return new


def _limit(number: int) -> int:
    soft = resource.getrlimit(number)[0]
    return 1 << 63 if soft == resource.RLIM_INFINITY else soft
