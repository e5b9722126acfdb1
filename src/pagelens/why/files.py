"""What kind of file stands behind a mapping: on a disk, in memory (tmpfs, memfd, System V), or of huge pages.

A name tells it for memory that has none of its own (memfd:, SYSV, /dev/zero); for a file on a mounted tmpfs only its
file system does, and system calls name files by their last component. So the capture's settings carry the devices of
the file systems that live in memory. Rejected: asking stat at the reader's (another machine, another day).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

NAMELESS = "anonymous"  # in the place of a device: shared memory that mmap made without a file
_MEMORY = ("memfd:", "/memfd:", "SYSV", "/SYSV", "/dev/shm/", "/dev/zero")


class Files:
    """filesystems: type of those in memory by device, as /proc/PID/maps prints it ("00:1a"), hexadecimal."""

    def __init__(self, filesystems: object = None) -> None:
        known = filesystems if isinstance(filesystems, Mapping) else {}
        self._types: dict[str, str] = {str(dev): str(kind) for dev, kind in known.items()}

    def in_memory(self, dev: str, name: str) -> bool:
        """Whether the page cache is all there is of the file."""
        return name.startswith(_MEMORY) or dev in self._types

    def huge(self, dev: str, name: str) -> bool:
        """Whether it consists of huge pages (hugetlbfs)."""
        return name.startswith("/anon_hugepage") or self._types.get(dev) == "hugetlbfs"

    def learn_huge(self, dev: str) -> None:
        """That a device, which is mounted nowhere, is the kernel's own hugetlbfs."""
        self._types[dev] = "hugetlbfs"


def device(number: int) -> str:
    """A device as stat(2) gives it, in the words of /proc/PID/maps.

    >>> device(0x1a), device(0xfe00)
    ('00:1a', 'fe:00')
    """
    return f"{os.major(number):02x}:{os.minor(number):02x}"
