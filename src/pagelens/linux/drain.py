"""The C drain and launcher (native/ring), wrapped: types once, errors as exceptions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pagelens.linux.native import library

KINDS = 10  # PL_KINDS of native/bpf/record.h


class DrainStats(ctypes.Structure):
    """struct pl_drain_stats of native/ring/drain.h."""

    _fields_ = (
        ("segment", ctypes.c_uint64),
        ("segment_bytes", ctypes.c_uint64),
        ("passes", ctypes.c_uint64),
        ("watermark_ns", ctypes.c_uint64),
        ("high_water", ctypes.c_uint64),
        ("faults", ctypes.c_uint64),
        ("dropped_faults", ctypes.c_uint64),
        ("dropped_others", ctypes.c_uint64),
        ("damaged", ctypes.c_uint64),
        ("taken", ctypes.c_uint64 * KINDS),
        ("error", ctypes.c_int64),
    )


@functools.cache
def _core() -> ctypes.CDLL:
    lib = library()
    pointer = ctypes.c_void_p
    lib.pl_drain_open.restype = pointer
    lib.pl_drain_open.argtypes = [
        ctypes.c_uint,
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_size_t,
        ctypes.c_char_p,
    ]
    lib.pl_drain_start.argtypes = [pointer]
    lib.pl_drain_rotate.argtypes = [pointer]
    lib.pl_drain_rotate.restype = ctypes.c_uint64
    lib.pl_drain_stop.argtypes = [pointer]
    lib.pl_drain_stop.restype = ctypes.c_uint64
    lib.pl_drain_stats.argtypes = [pointer, pointer]
    lib.pl_drain_stats.restype = None
    lib.pl_drain_free.argtypes = [pointer]
    lib.pl_drain_free.restype = None
    lib.pl_record_sizes.argtypes = [pointer]
    lib.pl_record_sizes.restype = None
    return lib


def record_sizes() -> list[int]:
    """Bytes of: a spooled fault, a spooled call, the task state, the totals, the drain's figures, a raw stack,
    a batch of faults."""
    sizes = (ctypes.c_uint64 * 7)()
    _core().pl_record_sizes(ctypes.byref(sizes))
    return list(sizes)


class Drain:
    """Empties BPF rings into segment files NNNNNNNN.{faults,calls,switches,stacks,text} of `directory`."""

    def __init__(self, ring_fds: Sequence[int], ring_size: int, directory: Path) -> None:
        """ring_fds: by CPU number, -1 for none. ring_size: bytes of each ring."""
        fds = (ctypes.c_int * max(1, len(ring_fds)))(*ring_fds)
        self._drain = _core().pl_drain_open(len(ring_fds), fds, ring_size, os.fsencode(directory))
        if not self._drain:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))

    @property
    def handle(self) -> int | None:
        """The C object, for a source that hands it records (native/perf)."""
        return int(self._drain) if self._drain else None

    def start(self) -> None:
        """Start the thread."""
        code = _core().pl_drain_start(self._drain)
        if code:
            raise OSError(code, os.strerror(code))

    def rotate(self) -> int:
        """Close the segment that is being written; returns its number."""
        return int(_core().pl_drain_rotate(self._drain))

    def stats(self) -> DrainStats:
        """Figures up to now."""
        stats = DrainStats()
        if self._drain:
            _core().pl_drain_stats(self._drain, ctypes.byref(stats))
        return stats

    def stop(self) -> int:
        """Stop the thread, take what is left in the rings, close the last segment; returns its number."""
        return int(_core().pl_drain_stop(self._drain)) if self._drain else -1

    def free(self) -> None:
        """Unmap the rings."""
        if self._drain:
            _core().pl_drain_free(self._drain)
            self._drain = None


class HeldProgram:
    """A child that will execute a program, and waits for `release` before it does."""

    def __init__(self, path: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Fork. path: the file; argv: its arguments, argv[0] included. OSError where fork fails."""
        environment = os.environb if env is None else {os.fsencode(k): os.fsencode(v) for k, v in env.items()}
        c_argv = (ctypes.c_char_p * (len(argv) + 1))(*[os.fsencode(a) for a in argv], None)
        c_envp = (ctypes.c_char_p * (len(environment) + 1))(
            *[k + b"=" + v for k, v in environment.items()], None
        )
        go, err = ctypes.c_int(), ctypes.c_int()
        pid = _core().pl_launch(os.fsencode(path), c_argv, c_envp, ctypes.byref(go), ctypes.byref(err))
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        self.pid = int(pid)
        self._go = go.value
        self.error_fd = err.value

    def release(self) -> None:
        """Let the child call execve."""
        with contextlib.suppress(BrokenPipeError):  # killed meanwhile; waiting for it tells how
            os.write(self._go, b"g")
        self.abandon()

    def abandon(self) -> None:
        """Without a release before: the child ends with 125."""
        if self._go >= 0:
            os.close(self._go)
            self._go = -1

    def exec_error(self) -> int:
        """Blocks until execve has succeeded (0) or failed (errno). With a tracer, call it when the
        child is gone.
        """
        data = os.read(self.error_fd, 4)
        os.close(self.error_fd)
        return int.from_bytes(data, "little") if len(data) == 4 else 0
