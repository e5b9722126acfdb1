"""Which other processes map, or have open, the same files or shared memory.

There is no index from an object to its users that user space may ask (the kernel's i_mmap tree is its own), so the
maps and the descriptors of every process are read: some 100 us each. Rejected: the link count of memfds and nattch of
System V segments (they count descriptors and attaches, also the process's own, and say nothing of /dev/shm and
MAP_SHARED|MAP_ANON); stat of every descriptor (one of a dead FUSE or NFS mount blocks for ever).

A descriptor is the object's where its link ends in the same name, fdinfo has the same inode number (Linux 5.14; neither
asks the file's own file system), and only then its stat the same device. What no process has in its table is not
seen: a descriptor on its way through a socket, one that io_uring holds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

Key = tuple[str, int]  # device as maps prints it, inode


@dataclass(frozen=True, slots=True)
class Others:
    """of: key -> (pid, name) of each other process that maps it. holders: of each that has it open and does not map
    it. unread: how many processes' maps were refused."""

    of: dict[Key, list[tuple[int, str]]]
    holders: dict[Key, list[tuple[int, str]]]
    unread: int

    def __contains__(self, key: Key) -> bool:
        """Whether any other process uses it."""
        return key in self.of or key in self.holders


def others(pid: int, objects: Mapping[Key, str]) -> Others:
    """Other processes than `pid` that use any of `objects` (key -> its name in maps) now. Those of other pid
    namespaces than ours are not seen."""
    wanted = {key: f" {key[0]} {key[1]} ".encode() for key in objects}
    found = Others({}, {}, 0)
    unread = 0
    if not wanted:
        return found
    for name in os.listdir("/proc"):  # noqa: PTH208 - names only
        if not name.isdigit() or int(name) == pid:
            continue
        try:
            with open(f"/proc/{name}/maps", "rb") as file:
                text = file.read()
            mapped = {key for key, pattern in wanted.items() if pattern in text}
            opened = _opened(name, objects) - mapped
        except PermissionError:
            unread += 1
        except OSError:
            continue  # gone meanwhile
        else:
            for keys, into in ((mapped, found.of), (opened, found.holders)):
                for key in keys:
                    into.setdefault(key, []).append((int(name), _comm(name)))
    return Others(found.of, found.holders, unread)


def _opened(pid: str, objects: Mapping[Key, str]) -> set[Key]:
    names = {_last(text) for text in objects.values()}
    inodes = {inode for _, inode in objects}
    out: set[Key] = set()
    base = f"/proc/{pid}"
    for fd in os.listdir(f"{base}/fd"):  # noqa: PTH208 - names only
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if _last(os.readlink(f"{base}/fd/{fd}")) not in names:  # noqa: PTH115 - anon_inode:… is no path
                continue
            if _inode(f"{base}/fdinfo/{fd}") in inodes:
                stat = os.stat(f"{base}/fd/{fd}")  # noqa: PTH116 - as above
                device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
                out |= {key for key, text in objects.items() if _same(key, text, device, stat.st_ino)}
    return out


def _same(key: Key, name: str, device: str, inode: int) -> bool:
    # btrfs and overlayfs: maps has another device than stat (a volume's own). The same inode and name must do there.
    return key[1] == inode and (key[0] == device or not name.startswith(("/memfd:", "/dev/", "/SYSV")))


def _inode(fdinfo: str) -> int | None:
    with open(fdinfo, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("ino:"):
                return int(line[4:])
    return None


def _last(path: str) -> str:
    return path.removesuffix(" (deleted)").rpartition("/")[2]


def _comm(name: str) -> str:
    try:
        with open(f"/proc/{name}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"
