"""The words of a scenario's lines: numbers, ranges, flags, and the names that exist so far."""

from __future__ import annotations

import re

from pagelens.model import op as ops
from pagelens.model.op import Place
from pagelens.vm.units import PAGE_SIZE

_RANGE = re.compile(
    r"(?P<base>[A-Za-z_]\w*|0x[0-9a-fA-F]+)(?:\[(?P<first>-?\d+)(?::(?P<last>-?\d+))?\])?(?:\+(?P<plus>\d+))?"
    r"(?:~(?P<bytes>\d+))?$"
)


class BadLineError(Exception):
    """Cause of a bad line; the caller adds name and line number."""


class Scope:
    """Names that exist so far, with their sizes where known: `a` alone means the whole region."""

    def __init__(self) -> None:
        self.regions: dict[str, int] = {"arena": ops.ARENA_PAGES * PAGE_SIZE, "heap": 0}
        self.files: dict[str, int] = {}
        self.procs: set[str] = {"main"}


class Words:
    """The words of a line, taken one by one."""

    def __init__(self, words: list[str]) -> None:
        self.left = words

    def take(self, what: str) -> str:
        """The next word; `what` is missing where there is none."""
        if not self.left:
            raise BadLineError(f"{what} is missing")
        return self.left.pop(0)

    def flags(self, table: dict[str, int], *, stop: tuple[str, ...] = ()) -> int:
        """All words up to one of `stop`, as the bits of `table` or flags=NUMBER."""
        value = 0
        while self.left and self.left[0] not in stop:
            word = self.left.pop(0)
            if word.startswith("flags="):
                value |= number(word[6:])
            elif word in table:
                value |= table[word]
            else:
                raise BadLineError(f"unknown word {word!r}; known: {' '.join(table)}")
        return value

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise BadLineError(f"too much: {' '.join(self.left)!r}")


def number(word: str) -> int:
    """A number, decimal or 0x."""
    try:
        return int(word, 0)
    except ValueError:
        raise BadLineError(f"not a number: {word!r}") from None


def size(word: str) -> int:
    """Bytes of a number of pages, or of ~BYTES."""
    return number(word[1:]) if word.startswith("~") else number(word) * PAGE_SIZE


def rights(word: str) -> int:
    """PROT_* of "rw", "none", "rw+growsdown"."""
    letters, *rest = word.split("+")
    value = 0
    for extra in rest:
        if extra not in ops.PROT_WORDS:
            raise BadLineError(f"not known behind `+`: {extra!r} ({', '.join(ops.PROT_WORDS)})")
        value |= ops.PROT_WORDS[extra]
    if letters == "none":
        return value
    for letter in letters:
        if letter not in ops.PROTS:
            raise BadLineError(f"not a protection: {word!r} (none, r, rw, rx …)")
        value |= ops.PROTS[letter]
    return value


def known_file(name: str, scope: Scope | None) -> str:
    """The name, if a file has it (without a scope, any)."""
    if scope is not None and name not in scope.files:
        raise BadLineError(f"no file {name!r} so far")
    return name


def place_of(word: str, scope: Scope | None) -> Place:
    """An address."""
    return range_of(word, scope)[0]


def range_of(word: str, scope: Scope | None) -> tuple[Place, int]:
    """(place, bytes); `a` alone is the whole region, whose size the scope knows (0 without a scope)."""
    match = _RANGE.match(word)
    if not match:
        raise BadLineError(f"not a range: {word!r} (examples: a, a[3], a[2:5], 0x10000[0:2])")
    base = match["base"]
    whole = 0
    if base.startswith("0x"):
        start = int(base, 16)
        region = ""
    else:
        start, region = 0, base
        if scope is not None:
            if base not in scope.regions and base not in scope.files:
                raise BadLineError(f"no region {base!r} so far")
            whole = scope.regions.get(base, scope.files.get(base, 0))
    first = int(match["first"] or 0)
    length = whole
    if match["first"] is not None:
        last = first + 1 if match["last"] is None else int(match["last"])
        if last < first:
            raise BadLineError(f"the range {word!r} ends before it starts")
        length = (last - first) * PAGE_SIZE
    if match["bytes"] is not None:
        length = int(match["bytes"])
    return Place(region, start + first * PAGE_SIZE + int(match["plus"] or 0)), length
