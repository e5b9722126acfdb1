"""Which other processes map the same files or shared memory.

There is no index from an object to its mappers that user space may ask (the kernel's i_mmap tree is its own), so the
maps of every process are read: 20 to 100 us each. Rejected: the link count of memfds and nattch of System V segments
(they count descriptors and attaches, also the process's own, and say nothing of /dev/shm and MAP_SHARED|MAP_ANON).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

Key = tuple[str, int]  # device as maps prints it, inode


@dataclass(frozen=True, slots=True)
class Others:
    """of: key -> (pid, name) of each other process that maps it. unread: how many processes' maps were refused."""

    of: dict[Key, list[tuple[int, str]]]
    unread: int


def others(pid: int, keys: Collection[Key]) -> Others:
    """Other processes than `pid` that map any of `keys` now. Those of other pid namespaces than ours are not seen."""
    wanted = {key: f" {key[0]} {key[1]} ".encode() for key in keys}
    found: dict[Key, list[tuple[int, str]]] = {}
    unread = 0
    if not wanted:
        return Others(found, unread)
    for name in os.listdir("/proc"):  # noqa: PTH208 - names only
        if not name.isdigit() or int(name) == pid:
            continue
        try:
            with open(f"/proc/{name}/maps", "rb") as file:
                text = file.read()
            for key, pattern in wanted.items():
                if pattern in text:
                    found.setdefault(key, []).append((int(name), _comm(name)))
        except PermissionError:
            unread += 1
        except OSError:
            continue  # gone meanwhile
    return Others(found, unread)


def _comm(name: str) -> str:
    try:
        with open(f"/proc/{name}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"
