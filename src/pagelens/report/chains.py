"""Call stacks with names: whole chains, and the innermost function of a Python program.

CPython 3.12 and later, run with -X perf (or sys.activate_stack_trampoline), gives each Python function a piece of
machine code of its own and names it in a perf map: the truth about which one ran, as far as the stack reaches it. Frame
pointers seldom do (the interpreter has none), .eh_frame does (`--detail full`). Rejected: reading the interpreter's
own structures at the fault, whose layout no version promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.report import faults as report

I64 = npt.NDArray[np.int64]
Describe = Callable[[int], dict[str, Any]]
_PYTHON = "py::"  # how CPython names them: py::FUNCTION:FILE
_DEEP = 64


def named(faults: report.Faults, depth: int) -> tuple[I64, list[tuple[str, ...]]]:
    """(index for each fault, chains of names): innermost first, at most `depth` frames."""
    # One stack_id may serve several processes: frames are named in the mm and at the time of its first fault.
    c = faults.columns
    stack = c["stack_id"] * (1 << 20) + c["mm"]
    unique, first, back = np.unique(stack, return_index=True, return_inverse=True)
    wanted = set((unique >> 20).tolist())
    frames = {
        r["stack_id"]: r["frames"]
        for r in faults.capture.table("stacks").to_pylist()
        if r["stack_id"] in wanted
    }
    mm, time, pid, addr, owner = [], [], [], [], []
    for i, (key, at) in enumerate(zip(unique.tolist(), first.tolist(), strict=True)):
        chain = frames.get(key >> 20) or [int(c["ip"][at])]
        for frame, address in enumerate([a for a in chain if a][:depth]):
            # A return address is behind its call: look one byte before.
            addr.append(address - (1 if frame else 0))
            mm.append(int(c["mm"][at]))
            time.append(int(c["time_ns"][at]))
            pid.append(int(c["pid"][at]))
            owner.append(i)
    addresses = np.array(addr, dtype=np.uint64)
    area, areas = faults.spaces.locate(np.array(mm, np.int64), np.array(time, np.int64), addresses)
    shifted = np.where(area >= 0, area + len(faults.areas), -1)
    faults.areas = [*faults.areas, *areas]
    index, found = report.places(faults, np.array(pid, np.int64), shifted, addresses)
    chains: dict[int, list[str]] = {}
    for i, where, one in zip(owner, index.tolist(), shifted.tolist(), strict=True):
        name = str(found[where]) if found[where].known else f"? in {report.module_of(faults, one)}"
        chains.setdefault(i, []).append(name)
    return back.reshape(-1), [tuple(chains.get(i, ["(no stack)"])) for i in range(len(unique))]


def _numbered(
    back: I64, of_stack: list[Any], describe: Callable[[Any], dict[str, Any]]
) -> tuple[I64, Describe]:
    names: dict[Any, int] = {}
    table = np.array([names.setdefault(name, len(names)) for name in of_stack], np.int64)
    rows = list(names)
    return table[back], lambda k: describe(rows[k])


def by_stack(faults: report.Faults, depth: int) -> tuple[I64, Describe]:
    """Keys of `--by stack`."""
    back, chains = named(faults, depth)
    return _numbered(back, chains, lambda chain: {"what": " < ".join(chain), "frames": list(chain)})


def by_python(faults: report.Faults) -> tuple[I64, Describe]:
    """Keys of `--by python`: the innermost Python function of the stack, else the C function at the top."""
    back, chains = named(faults, _DEEP)
    of_stack = []
    for chain in chains:
        inner = python_function(chain)
        if inner:
            function, _, file = inner.partition(":")
            of_stack.append((function, file))
        else:
            of_stack.append((chain[0].split(" ")[0] if chain[0][0] not in "?(" else chain[0], ""))
    return _numbered(back, of_stack, lambda name: {"what": name[0], "file": name[1] or None})


def python_function(chain: tuple[str, ...]) -> str:
    """The innermost Python function of a chain of names, as FUNCTION:FILE; empty where there is none."""
    return next((name.removeprefix(_PYTHON) for name in chain if name.startswith(_PYTHON)), "")


def python_share(faults: report.Faults) -> tuple[int, int]:
    """(faults whose stack shows a Python function, faults in all)."""
    back, chains = named(faults, _DEEP)
    shown = np.array([bool(python_function(chain)) for chain in chains], bool)
    return (int(np.count_nonzero(shown[back])) if len(back) else 0), len(faults)
