"""What must not happen to the child of a proof, each read back from the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagelens.linux.procfs import Process


@dataclass(frozen=True, slots=True)
class Fence:
    """One thing that must not happen to the child. ok: verified. how: by which means, or what is wrong."""

    name: str
    ok: bool
    how: str


def of_process(process: Process, *, local: bool) -> tuple[Fence, ...]:
    """What is read of the child and of the machine. local: the child's memory policy is MPOL_LOCAL."""
    persona = int(process.read("personality"), 16)
    status = process.read("status").decode()
    swaps = len(Path("/proc/swaps").read_text().splitlines()) - 1
    ksm = figure("/sys/kernel/mm/ksm/run", 0)
    numa = figure("/proc/sys/kernel/numa_balancing", 0)
    pagers = _damon_pagers()
    return (
        Fence("aslr", bool(persona & 0x40000), f"personality {persona:#x}"),
        Fence("thp", "THP_enabled:\t0" in status, "PR_SET_THP_DISABLE, read back from status"),
        Fence("ksm", ksm == 0, f"/sys/kernel/mm/ksm/run is {ksm}"),
        Fence("numa", numa == 0 or local, f"numa_balancing {numa}, policy MPOL_LOCAL"),
        Fence("swap", swaps == 0, f"{swaps} swap areas"),
        Fence("damon", not pagers, f"DAMON schemes that page out: {', '.join(pagers) or 'none'}"),
    )


def figure(path: str, default: int) -> int:
    """The number in a file of one number; `default` where it cannot be read."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return default


def _damon_pagers() -> list[str]:
    # DAMON schemes that run and unmap pages (damon_pa_pageout, reclaim_pages): the one thing that takes a page from the
    # child although nobody asked for it. It is the machine's own affair; what is gone when a program runs again may be
    # its doing. Readable by root only.
    found = []
    for state in Path("/sys/kernel/mm/damon/admin/kdamonds").glob("*/state"):
        try:
            if state.read_text().strip() != "on":
                continue
            actions = state.parent.glob("contexts/*/schemes/*/action")
            found += [
                f"kdamond {state.parent.name}"
                for action in actions
                if action.read_text().strip() == "pageout"
            ]
        except OSError:
            continue
    if _text("/sys/module/damon_reclaim/parameters/enabled") == "Y":
        found.append("damon_reclaim")
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
