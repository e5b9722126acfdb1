"""Delta debugging: from a failing program to the few operations that matter (Zeller's ddmin).

Each trial runs in a fresh world, so it costs a few milliseconds and nothing is carried over. Operations whose
names vanish with an earlier one are left out by the worlds themselves, so any subset is a valid program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pagelens.model.op import Op
from pagelens.vm.units import PAGE_SIZE


def shrink(program: Sequence[Op], fails: Callable[[Sequence[Op]], bool], *, budget: int = 2000) -> list[Op]:
    """The smallest failing program found within `budget` trials. `fails` must hold for `program` itself;
    if it does not (the failure does not repeat), the program comes back unchanged."""
    trials = 0

    def still(candidate: Sequence[Op]) -> bool:
        nonlocal trials
        trials += 1
        return fails(candidate)

    current = list(program)
    if not still(current):
        return current
    parts = 2
    while len(current) >= 2 and trials < budget:
        size = max(1, len(current) // parts)
        for start in range(0, len(current), size):
            candidate = current[:start] + current[start + size :]
            if candidate and trials < budget and still(candidate):
                current = candidate
                parts = max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(len(current), parts * 2)
    return _simplify(current, still, lambda: trials < budget)


def _simplify(program: list[Op], fails: Callable[[Sequence[Op]], bool], more: Callable[[], bool]) -> list[Op]:
    # Then each operation is made plainer, as far as the failure stays: one page instead of many, no flags
    # that do not matter.
    for i in range(len(program)):
        for simpler in _simpler(program[i]):
            if not more():
                return program
            candidate = [*program[:i], simpler, *program[i + 1 :]]
            if fails(candidate):
                program = candidate
                break
    return program


def _simpler(op: Op) -> list[Op]:
    out = []
    if op.name in ("read", "write", "exec") and op.length > PAGE_SIZE:
        out.append(replace(op, length=PAGE_SIZE))
    if op.name == "mmap":
        for bit in (0x4000, 0x8000, 0x2000, 0x20000, 0x100):
            if op.flags & bit:
                out.append(replace(op, flags=op.flags & ~bit))
    return out
