"""Programs of a newer Debian, with all their libraries: CRIU for the guests, qemu for this machine.

They are unpacked in the cache and run by their own loader, so nothing is installed and it does not matter how old
this machine's C library is. Fetched once.

bookworm's CRIU does not know the kernels of the matrix. bookworm's qemu (7.2) loses writes to code that another
CPU is translating at that moment (accel/tcg locks the page first since 8.1): when a kernel patched a jump, and the
recorder's tracepoints patch many, a guest now and then died of a half-patched one, at boot or in a test.
"""

from __future__ import annotations

from pathlib import Path

from vmtest.apt import Apt, unpack
from vmtest.cache import kernels_dir, locked

LOADER = "usr/lib64/ld-linux-x86-64.so.2"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


def _home(name: str) -> Path:
    return kernels_dir() / name


def tree(name: str, suite: str = "trixie") -> tuple[str, Path]:
    """(version, unpacked tree) of a package and all it depends on, fetched when it is not there yet."""
    with locked(name):
        root = _home(name)
        stamp = root / "version"
        if not stamp.exists():
            apt = Apt((suite,))
            apt.update()
            packages = apt.download(apt.closure(name), root / "packages")
            for package in packages:
                unpack(package.file, root / "tree")
            stamp.write_text(next(p.version for p in packages if p.name == name))
        return stamp.read_text(), root / "tree"


def is_here(name: str) -> bool:
    """Whether `tree(name)` would not download."""
    return (_home(name) / "version").exists()


def command(root: Path, program: str) -> list[str]:
    """How to start a program of a tree, by the tree's own loader and libraries."""
    return [str(root / LOADER), "--library-path", str(root / LIBRARIES), str(root / program)]
