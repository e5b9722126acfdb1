"""Fixtures that change a whole machine's settings: swap, NUMA balancing, huge pages, KSM. Put back
afterwards.

They act in a guest of the test matrix, or where PAGELENS_CHANGE_SYSTEM=1 says that this machine may be
changed; elsewhere the test is skipped: nobody's swap or huge-page setting is touched by running tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import raw

THP = "/sys/kernel/mm/transparent_hugepage"
NUMA = "/proc/sys/kernel/numa_balancing"
KSM = "/sys/kernel/mm/ksm"


def may_change_system() -> None:
    """Skips the test where the machine is not ours to change."""
    if "VMTEST_GUEST" not in os.environ and os.environ.get("PAGELENS_CHANGE_SYSTEM") != "1":
        pytest.skip(
            "missing capability: guest (changes the machine's settings; PAGELENS_CHANGE_SYSTEM=1 allows it)"
        )


def put(path: str, value: str) -> None:
    """Writes a setting; skips, naming it, where the kernel has none."""
    if not Path(path).exists():
        pytest.skip(f"missing capability: {path}")
    Path(path).write_text(value)


@contextlib.contextmanager
def setting(path: str, value: str) -> Iterator[str]:
    """A setting for a while; yields what it was."""
    may_change_system()
    if not Path(path).exists():
        pytest.skip(f"missing capability: {path}")
    before = raw.setting(path)
    put(path, value)
    try:
        yield before
    finally:
        put(path, before)


@pytest.fixture
def change_setting() -> Iterator[Callable[[str, str], str]]:
    """`change_setting(path, value)`: all are put back after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda path, value: stack.enter_context(setting(path, value))


@pytest.fixture
def swap() -> Iterator[Path]:
    """256 MiB of swap in a file, on for the test."""
    may_change_system()
    libc = ctypes.CDLL(None, use_errno=True)
    path = Path("/var/tmp/pagelens-test.swap")
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 256 * 2**20)
    path.chmod(0o600)
    subprocess.run(["mkswap", str(path)], check=True, capture_output=True)
    if libc.swapon(os.fsencode(path), 0):
        path.unlink()
        pytest.skip(f"missing capability: swap ({os.strerror(ctypes.get_errno())})")
    try:
        yield path
    finally:
        assert libc.swapoff(os.fsencode(path)) == 0, os.strerror(ctypes.get_errno())
        path.unlink()


@pytest.fixture
def numa_balancing() -> Iterator[None]:
    """NUMA balancing on (hint faults need a second thread or a page on another node, and a second of CPU)."""
    with setting(NUMA, "1"):
        yield


@pytest.fixture
def no_numa_balancing() -> Iterator[None]:
    """NUMA balancing off: nothing unmaps pages meanwhile. Nothing is changed where it is off already."""
    if not Path(NUMA).exists() or raw.setting(NUMA) == "0":
        yield
        return
    with setting(NUMA, "0"):
        yield


@pytest.fixture
def thp_always() -> Iterator[None]:
    """Transparent huge pages wherever they fit."""
    with setting(f"{THP}/enabled", "always"):
        yield


@pytest.fixture
def thp_madvise() -> Iterator[None]:
    """Transparent huge pages only where madvise asks for them."""
    with setting(f"{THP}/enabled", "madvise"):
        yield


@pytest.fixture
def ksm() -> Iterator[None]:
    """The KSM daemon running without a pause; what it merged is broken up again afterwards."""
    with setting(f"{KSM}/sleep_millisecs", "0"), setting(f"{KSM}/pages_to_scan", "10000"):
        put(f"{KSM}/run", "1")
        try:
            yield
        finally:
            put(f"{KSM}/run", "2")
            put(f"{KSM}/run", "0")
