"""Kernel settings that decide what a fault does: a capture carries them, since they differ by machine and
day.
"""

from __future__ import annotations

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
    return out
