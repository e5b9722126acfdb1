"""Kernel settings that decide what a fault does: a capture carries them, since they differ by machine and
day.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from pagelens.vm.units import task_size

_FILES = {
    "thp": "/sys/kernel/mm/transparent_hugepage/enabled",
    "thp_zero_page": "/sys/kernel/mm/transparent_hugepage/use_zero_page",
    "thp_shmem": "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "numa_balancing": "/proc/sys/kernel/numa_balancing",
    "overcommit_memory": "/proc/sys/vm/overcommit_memory",
    "swappiness": "/proc/sys/vm/swappiness",
    "max_map_count": "/proc/sys/vm/max_map_count",
    "ksm": "/sys/kernel/mm/ksm/run",
}


_MEMORY_FILESYSTEMS = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}


def memory_settings() -> dict[str, object]:
    """Settings by name: numbers as int, a choice as its word ("madvise"). What cannot be read is left out.

    Source: Documentation/admin-guide/mm/transhuge.rst, Documentation/admin-guide/sysctl/{kernel,vm}.rst.
    """
    out: dict[str, object] = {}
    for name, path in _FILES.items():
        try:
            with open(path) as stream:
                text = stream.read().strip()
        except OSError:
            continue
        if "[" in text:
            out[name] = text[text.index("[") + 1 : text.index("]")]
        else:
            out[name] = int(text) if text.isdigit() else text
    try:
        with open("/proc/swaps") as stream:
            out["swap"] = len(stream.readlines()) > 1
    except OSError:
        pass
    out["filesystems"] = memory_filesystems()
    return out


@functools.cache
def user_space_end() -> int:
    """The first address behind user space, in bytes: more where page tables have five levels.

    Source: the flag la57 of /proc/cpuinfo, which the kernel clears where it does not use them
    (arch/x86/kernel/cpu/common.c early_identify_cpu).
    """
    with open("/proc/cpuinfo") as stream:
        flags = next((line for line in stream if line.startswith("flags")), "")
    return task_size(5 if "la57" in flags.split() else 4)


def memory_filesystems() -> dict[str, str]:
    """Type of each mounted file system that lives in memory, by device as /proc/PID/maps prints it ("00:1a")."""
    return {device: kind for device, kind in _mounted().items() if kind in _MEMORY_FILESYSTEMS}


def filesystem(path: str) -> str:
    """Type of the file system that holds `path`; empty where its device is not that of a mount (subvolumes)."""
    device = Path(path).stat().st_dev
    return _mounted().get(f"{os.major(device):02x}:{os.minor(device):02x}", "")


def _mounted() -> dict[str, str]:
    # /proc/self/mountinfo (Documentation/filesystems/proc.rst): field 3, and the first after the dash.
    out: dict[str, str] = {}
    try:
        with open("/proc/self/mountinfo", errors="replace") as stream:
            for line in stream:
                mount, _, rest = line.partition(" - ")
                major, minor = (int(n) for n in mount.split()[2].split(":"))
                out[f"{major:02x}:{minor:02x}"] = rest.split(" ", 1)[0]
    except OSError:
        pass
    return out
