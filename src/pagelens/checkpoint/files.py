"""Writing so that a crash at any byte leaves either the old state or the new one.

Every write of a checkpoint goes through `Files`, which makes it the one place where tests inject a full disk,
EIO or SIGKILL at the N-th operation. The rules: a checkpoint is written as a directory `.NAME.partial` beside
its place; each file is written, synced and closed; the directory is synced; only then it is renamed to NAME
and the parent directory synced. A reader never looks at partial directories.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from pagelens.linux.disk import sync
from pagelens.vm.errors import UsageError

RENAME_EXCHANGE = 2


@contextlib.contextmanager
def _named(fd: int) -> Iterator[None]:
    # A full disk: the error says which file.
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            error.filename = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - a name to show
        raise


class Files:
    """File operations, each counted by `step` (which tests override to fail)."""

    def step(self, what: str) -> None:
        """Called before each operation that reaches the disk."""

    def write(self, fd: int, data: bytes | memoryview) -> None:
        """All of `data`, over short writes."""
        self.step("write")
        view = memoryview(data).cast("B")
        with _named(fd):
            while len(view):
                done = os.write(fd, view[: 1 << 30])
                view = view[done:]

    def pwrite(self, fd: int, data: bytes, at: int) -> None:
        """All of `data` at offset `at`, over short writes."""
        self.step("write")
        view = memoryview(data)
        with _named(fd):
            while view:
                done = os.pwrite(fd, view, at)
                view, at = view[done:], at + done

    def sync(self, fd: int) -> None:
        """fsync."""
        self.step("fsync")
        with _named(fd):
            os.fsync(fd)

    def sync_dir(self, path: Path) -> None:
        """fsync of a directory: its entries are on disk."""
        self.step("fsync dir")
        sync(path)

    def put(self, path: Path, data: bytes | memoryview) -> None:
        """A whole new file, synced."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self.write(fd, data)
            self.sync(fd)
        finally:
            os.close(fd)

    def publish(self, partial: Path, final: Path) -> None:
        """Rename a complete directory into place; one that is there already is exchanged for it,
        atomically."""
        self.sync_dir(partial)
        self.step("rename")
        if final.exists():
            libc = ctypes.CDLL(None, use_errno=True)
            old, new = os.fsencode(partial), os.fsencode(final)
            if libc.renameat2(-100, old, -100, new, RENAME_EXCHANGE):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(final))
            self.sync_dir(final.parent)
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.rename(final)
            self.sync_dir(final.parent)

    def discard(self, path: Path) -> None:
        """Delete a checkpoint. It goes at once: renamed to .NAME.dropped, which nobody takes for one; what a crash
        leaves of that, the next `sweep` deletes. UsageError where a writer has it."""
        with WriteLock(path):
            trash = dropped(path)
            shutil.rmtree(trash, ignore_errors=True)
            self.step("rename")
            path.rename(trash)
            try:
                self.sync_dir(path.parent)
                self._clear(trash)
            except OSError:
                shutil.rmtree(trash, ignore_errors=True)
                raise

    def sweep(self, path: Path) -> None:
        """Delete what a killed writer or `discard` of this name has left, unless a writer is at it now."""
        leftovers = [p for p in (partial(path), dropped(path)) if p.is_dir()]
        if leftovers:
            with contextlib.suppress(UsageError), WriteLock(path):
                for leftover in leftovers:
                    self._clear(leftover)

    def _clear(self, folder: Path) -> None:
        # A checkpoint's directory is flat.
        for entry in [*folder.iterdir(), folder]:
            self.step("unlink")
            entry.rmdir() if entry == folder else entry.unlink()


def partial(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.parent / f".{final.name}.partial"


def dropped(final: Path) -> Path:
    """Where a checkpoint is deleted."""
    return final.parent / f".{final.name}.dropped"


class WriteLock:
    """One writer per checkpoint name: an flock of `.NAME.lock` beside it, gone with its process."""

    def __init__(self, final: Path) -> None:
        self.path = final.parent / f".{final.name}.lock"
        self._fd = -1

    def __enter__(self) -> WriteLock:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise UsageError(
                        f"another pagelens is writing {self.path.name[1:-5]} (lock {self.path}); wait for it"
                    ) from None
                raise
            # The holder before us may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == self.path.stat().st_ino:
                    self._fd = fd
                    return self
            os.close(fd)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
