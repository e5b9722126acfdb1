"""Who descends from whom, from /proc, now.

Processes come and go while it is read, so the answer is a lower bound; who needs all of them asks until nothing
new appears (capture.attach).
"""

from __future__ import annotations

import os

from pagelens.linux.procfs import Process
from pagelens.vm.errors import PagelensError


def descendants(roots: list[int]) -> list[int]:
    """The processes of `roots` and all their descendants that can be seen now."""
    return list(parents(roots))


def parents(roots: list[int]) -> dict[int, int]:
    """The processes of `roots` and all their descendants that can be seen now, each with its parent (0: a root)."""
    children: dict[int, list[int]] = {}
    for name in [entry.name for entry in os.scandir("/proc")]:
        if name.isdigit():
            try:
                with Process.open(int(name)) as process:
                    children.setdefault(process.stat().ppid, []).append(int(name))
            except PagelensError:
                continue
    found, queue = dict.fromkeys(roots, 0), list(roots)
    while queue:
        parent = queue.pop()
        for child in children.get(parent, []):
            if child not in found:
                found[child] = parent
                queue.append(child)
    return found
