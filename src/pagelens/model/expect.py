"""Expectations of a scenario, checked against a world: the model or the kernel, by the same code."""

from __future__ import annotations

import numpy as np

from pagelens.model import op as ops
from pagelens.model.op import Outcome
from pagelens.model.scenario import Expectation, Line
from pagelens.model.world import World
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Vma

_BITS = {"present": 63, "swapped": 62, "file": 61, "exclusive": 56, "guard": 58, "dirty": 55}


def applies(line: Line, profile: str) -> bool:
    """Whether the line is for this profile ("linux-6.18+rule=1" counts as linux-6.18)."""
    return not line.profiles or profile.partition("+")[0] in line.profiles


def check(expected: Expectation, world: World, outcome: Outcome | None, *, soft_dirty: bool) -> str | None:
    """What is there instead, or None if the expectation holds.

    outcome: of the operation before. soft_dirty: whether this kernel has it; without it, soft-dirty
    words always hold (`uncheckable` says which).
    """
    match expected.kind:
        case "faults":
            got = outcome.faults if outcome else None
            return None if got == expected.value else f"{got} faults"
        case "result":
            return _result(expected, world, outcome)
        case "signal":
            return _signal(expected, outcome)
        case "vmas":
            found = len(_vmas(expected, world))
            return None if found == expected.value else f"{found} vmas"
        case "vma":
            return _vma(expected, world)
        case "page" | "pages":
            return _pages(expected, world, soft_dirty)
        case "smaps":
            return _smaps(expected, world)
    raise AssertionError(expected.kind)


def uncheckable(expected: Expectation, *, soft_dirty: bool) -> bool:
    """Whether the kernel lacks what the expectation asks about."""
    return not soft_dirty and any(word.removeprefix("!") == "dirty" for word in expected.words)


def _result(expected: Expectation, world: World, outcome: Outcome | None) -> str | None:
    if outcome is None:
        return "the operation was left out"
    if expected.words == ("ok",):
        good = not (outcome.signal or -4096 < outcome.result < 0)
    elif expected.place is not None:
        good = outcome.result == world.names.resolve(expected.place)
    else:
        good = outcome.result == expected.value
    return None if good else str(outcome)


def _signal(expected: Expectation, outcome: Outcome | None) -> str | None:
    if outcome is None:
        return "the operation was left out"
    wanted = 0 if expected.words == ("none",) else ops.SIGNALS[expected.words[0]]
    good = outcome.signal == wanted and (not expected.value or outcome.code == expected.value)
    if good:
        return None
    if not outcome.signal:
        return "no signal"
    return outcome.signal_text()


def _vmas(expected: Expectation, world: World) -> list[Vma]:
    vmas = world.vmas(expected.proc)
    if expected.place is None:
        return list(vmas)
    start = world.names.resolve(expected.place)
    return vmas.overlapping(start, start + expected.length)


def _vma(expected: Expectation, world: World) -> str | None:
    assert expected.place is not None
    start = world.names.resolve(expected.place)
    found = _vmas(expected, world)
    if len(found) == 1:
        vma = found[0]
        if (vma.start, vma.end, vma.perms) == (start, start + expected.length, expected.words[0]):
            return None
    return ", ".join(f"{v.start:#x}-{v.end:#x} {v.perms}" for v in found) or "nothing mapped"


def _pages(expected: Expectation, world: World, soft_dirty: bool) -> str | None:
    if expected.place is None:
        spans = [(v.start, v.pages) for v in world.vmas(expected.proc)]
    else:
        spans = [(world.names.resolve(expected.place), expected.length // PAGE_SIZE)]
    parts = [world.pagemap(expected.proc, start, pages) for start, pages in spans]
    entries = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    if expected.kind == "pages":
        found = sum(_has(int(e), expected.words[0], soft_dirty) for e in entries)
        return None if found == expected.value else f"{found} pages"
    for i, entry in enumerate(entries.tolist()):
        bad = [word for word in expected.words if not _has(entry, word, soft_dirty)]
        if bad:
            names = [name for name, bit in _BITS.items() if entry >> bit & 1]
            where = f"page {i}: " if len(entries) > 1 else ""
            return where + (" ".join(names) or "absent")
    return None


def _has(entry: int, word: str, soft_dirty: bool) -> bool:
    plain = word.removeprefix("!")
    if plain == "dirty" and not soft_dirty:
        return True
    if plain == "absent":
        value = not entry >> 63 & 1 and not entry >> 62 & 1
    elif plain == "anon":
        value = bool(entry >> 63 & 1) and not entry >> 61 & 1
    else:
        value = bool(entry >> _BITS[plain] & 1)
    return value != word.startswith("!")


def _smaps(expected: Expectation, world: World) -> str | None:
    assert expected.place is not None
    start = world.names.resolve(expected.place)
    vmas, accounting = world.accounting(expected.proc)
    field = expected.words[0]
    try:
        column = accounting.column(field)
    except KeyError:
        return f"no field {field}"
    total = 0
    for vma, value in zip(vmas, column.tolist(), strict=True):
        if vma.start < start + expected.length and vma.end > start:
            total += value
    return None if total == expected.value * 1024 else f"{total // 1024} kB"
