"""Files on disk for a program under proof: all pages in the page cache, each a folio of its own, written back."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import secrets
from pathlib import Path

import numpy as np

from pagelens.linux.settings import filesystem
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.units import HPAGE_SIZE, PAGE_SIZE

_PLACE = "/var/tmp"
_KNOWN = ("ext4", "xfs")  # whose files the model has: page_mkwrite, and no pages but those asked for


def make(pages: int) -> str:
    """A new file of zeros: its path, of 15 bytes at most. CapabilityMissingError where there is no disk."""
    path = _new()
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(pages):  # a larger write would make larger folios
                file.write(bytes(PAGE_SIZE))
            os.fsync(file.fileno())
    except BaseException as exc:
        Path(path).unlink()
        if isinstance(exc, OSError):
            raise _missing(f"{pages} pages in {_PLACE}: {exc.strerror}") from None
        raise
    return path


def _new() -> str:
    # A name that is not there yet, in 15 bytes: it goes to the child in two words.
    try:
        kind = filesystem(_PLACE)
        if kind not in _KNOWN:
            raise _missing(f"{_PLACE} is {kind or 'of an unknown type'}, not {' or '.join(_KNOWN)}")
        while True:
            path = f"{_PLACE}/{secrets.token_hex(3)}"
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                return path
    except OSError as exc:
        raise _missing(f"{_PLACE}: {exc.strerror}") from None


def _missing(why: str) -> CapabilityMissingError:
    return CapabilityMissingError(f"no file on disk: {why}", capability="disk")


@functools.cache
def aligns() -> int:
    """Whether large mappings of such files lie at multiples of 2 MiB (thp_get_unmapped_area): 0 or 1."""
    # Two that both lie so lie so on purpose.
    try:
        path = _new()
    except CapabilityMissingError:
        return 0
    try:
        with open(path, "r+b") as file:
            os.ftruncate(file.fileno(), HPAGE_SIZE)
            maps = [mmap.mmap(file.fileno(), HPAGE_SIZE) for _ in range(2)]
            starts = [np.frombuffer(one, np.uint8).ctypes.data for one in maps]
            return int(all(start % HPAGE_SIZE == 0 for start in starts))
    finally:
        Path(path).unlink()
