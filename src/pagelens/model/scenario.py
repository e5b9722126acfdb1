"""The scenario language: a program and what is expected of it, as text. docs/scenarios.md describes it.

One operation or expectation a line; `#` starts a comment. Parsing is pure and keeps line numbers, so that
every error names line and cause. The same scenario runs in the model (`model.runner`) and on the kernel
(`proof.verify`).

    a = mmap 4 rw private anon      # name = mmap PAGES [at PLACE] PROT FLAGS [file F[OFFSET]]
    write a[0:2]                    # pages 0 and 1
    expect faults 2
    q = fork                        # a process; its lines start with "q:"
    q: write a[0]
    q: expect faults 1
    on linux-6.1: expect vmas 1 in a
"""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from pagelens.model import op as ops
from pagelens.model.op import Op, Place
from pagelens.model.profile import PROFILES
from pagelens.model.words import (
    BadLineError,
    Scope,
    Words,
    known_file,
    number,
    place_of,
    range_of,
    rights,
    size,
)
from pagelens.vm.errors import DamagedInputError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
_PAGE_WORDS = frozenset({"present", "absent", "swapped", "file", "anon", "dirty", "exclusive", "guard"})
EXPECTATIONS = ("faults", "result", "signal", "vmas", "vma", "page", "pages", "smaps")


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must hold after the operation before it.

    kind: one of EXPECTATIONS. words: page state words, or the signal's name, the vma's perms, the field.
    value: count, result, si_code or kB. place, length: the range in question (length 0: the whole region).
    """

    kind: str
    proc: str = "main"
    value: int = 0
    words: tuple[str, ...] = ()
    place: Place | None = None
    length: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One line: number in the text (from 1), the text, its operation or expectation, the profiles that it
    is for
    (empty: all)."""

    number: int
    text: str
    item: Op | Expectation
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A parsed scenario. `title` is its first comment line."""

    name: str
    title: str
    lines: tuple[Line, ...]

    @property
    def operations(self) -> tuple[Op, ...]:
        """The operations alone."""
        return tuple(line.item for line in self.lines if isinstance(line.item, Op))


def parse(text: str, name: str = "scenario") -> Scenario:
    """Parse a scenario. DamagedInputError names the line and the cause."""
    lines: list[Line] = []
    title = ""
    scope = Scope()
    for at, raw in enumerate(text.splitlines(), 1):
        stripped = raw.strip()
        if stripped.startswith("#") and not title:
            title = stripped.lstrip("# ").strip()
        body = raw.partition("#")[0].strip()
        if not body:
            continue
        try:
            profiles, item = _line(body, scope)
        except BadLineError as bad:
            raise DamagedInputError(f"{name}, line {at}: {bad} (in {body!r})") from None
        lines.append(Line(at, body, item, profiles))
    if not any(isinstance(line.item, Op) for line in lines):
        raise DamagedInputError(f"{name}: holds no operation")
    return Scenario(name, title, tuple(lines))


def parse_op(text: str) -> Op:
    """One operation line, as `str(Op)` writes it; names need not have been defined. For tools and `model
    step`."""
    try:
        _, item = _line(text.partition("#")[0].strip(), None)
    except BadLineError as bad:
        raise DamagedInputError(f"{bad} (in {text!r})") from None
    if not isinstance(item, Op):
        raise DamagedInputError(f"not an operation: {text!r}")
    return item


def format_scenario(operations: Iterable[Op], title: str = "") -> str:
    """Text of a program, for keeping."""
    head = "".join(f"# {line}\n" for line in title.splitlines())
    return head + "".join(f"{op}\n" for op in operations)


def _line(body: str, scope: Scope | None) -> tuple[tuple[str, ...], Op | Expectation]:
    profiles: tuple[str, ...] = ()
    match = re.match(r"on\s+([\w.,\- ]+):\s*(.+)$", body)
    if match:
        profiles = tuple(p.strip() for p in match[1].split(","))
        # A name that is none would never apply, and so never fail.
        if unknown := [p for p in profiles if p not in PROFILES]:
            raise BadLineError(f"no kernel profile {unknown[0]!r}; profiles: {', '.join(PROFILES)}")
        body = match[2]
    proc = "main"
    match = re.match(r"([A-Za-z_]\w*)\s*:\s*(.+)$", body)
    if match:
        proc, body = match[1], match[2]
    if scope is not None and proc not in scope.procs:
        raise BadLineError(f"no process or thread {proc!r} so far")
    result = ""
    match = re.match(r"([A-Za-z_]\w*)\s*=\s*(.+)$", body)
    if match:
        result, body = match[1], match[2]
    try:
        words = shlex.split(body)
    except ValueError as exc:
        raise BadLineError(str(exc)) from None
    name, rest = words[0], words[1:]
    if name == "expect":
        if result:
            raise BadLineError("an expectation has no result")
        return profiles, _expectation(proc, rest, scope)
    if profiles:
        raise BadLineError(
            "only expectations can be for some kernels (`on`): the operations must be the same on all"
        )
    if name not in ops.NAMES:
        import difflib

        near = difflib.get_close_matches(name, [*ops.NAMES, "expect"], n=1)
        raise BadLineError(f"no operation {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    op = _operation(name, proc, result, rest, scope)
    if scope is not None:
        _define(op, scope)
    return profiles, op


def _define(op: Op, scope: Scope) -> None:
    needs = {
        "fork": "q = fork",
        "vfork": "q = vfork",
        "thread": "t = thread",
        "memfd": "f = memfd 16",
        "disk": "f = disk 16",
    }
    if op.name in needs and not op.result:
        raise BadLineError(f"needs a name: {needs[op.name]}")
    if not op.result:
        return
    if op.result in ("arena", "heap", "main", "expect", "on"):
        raise BadLineError(f"{op.result!r} is taken")
    if op.name in ("mmap", "shmat"):
        scope.regions[op.result] = op.length
    elif op.name == "mremap":
        scope.regions[op.result] = op.new_length
    elif op.name in ("memfd", "disk"):
        scope.files[op.result] = op.length
    elif op.name in ("fork", "vfork", "thread"):
        scope.procs.add(op.result)
    else:
        raise BadLineError(f"{op.name} gives nothing to name")


def _operation(name: str, proc: str, result: str, words: list[str], scope: Scope | None) -> Op:
    w = Words(words)
    place: Place | None = None
    length = 0
    kw: dict[str, object] = {}
    if name in ops.RANGED:
        place, length = range_of(w.take("a range such as a[0:2]"), scope)
    match name:
        case "mmap":
            length = size(w.take("the number of pages"))
            while w.left and w.left[0] == "at":
                w.take("at")
                place = place_of(w.take("the place after `at`"), scope)
            kw["prot"] = rights(w.take("the protection (rw, r, none …)"))
            flags = 0
            while w.left:  # in any order
                flags |= w.flags(ops.MAP_WORDS, stop=("file", "at"))
                match w.left and w.left.pop(0):
                    case "at":
                        place = place_of(w.take("the place after `at`"), scope)
                    case "file":
                        file = place_of(w.take("the file's name"), None)
                        kw["file"], kw["offset"] = known_file(file.region, scope), file.offset
            kw["flags"] = flags
        case "mprotect":
            kw["prot"] = rights(w.take("the protection (rw, r, none …)"))
        case "mremap":
            kw["new_length"] = size(w.take("the new number of pages"))
            flags = w.flags(ops.MREMAP_WORDS, stop=("to",))
            if w.left:
                w.take("to")
                kw["new_place"] = place_of(w.take("the place after `to`"), scope)
                flags |= w.flags(ops.MREMAP_WORDS)
            kw["flags"] = flags
        case "madvise":
            word = w.take("the advice")
            if word.startswith("flags="):
                kw["flags"] = number(word[6:])
            elif word in ops.ADVICE_WORDS:
                kw["flags"] = ops.ADVICE_WORDS[word]
            else:
                raise BadLineError(f"no advice {word!r}; known: {' '.join(ops.ADVICE_WORDS)}")
        case "brk":
            place = place_of(w.take("the new break, such as heap[4]"), scope)
        case "mlock2":
            kw["flags"] = w.flags(ops.MLOCK2_WORDS)
        case "mlockall":
            kw["flags"] = w.flags(ops.MLOCKALL_WORDS)
        case "msync":
            kw["flags"] = w.flags(ops.MSYNC_WORDS)
        case "memfd" | "disk":
            length = size(w.take("the number of pages"))
        case "ftruncate":
            kw["file"] = known_file(w.take("the file's name"), scope)
            length = size(w.take("the number of pages"))
        case "pwrite" | "fallocate":
            file_range, length = range_of(w.take("a range of the file such as f[0:2]"), None)
            if scope is not None and not length:
                length = scope.files.get(file_range.region, 0)
            kw["file"], kw["offset"] = known_file(file_range.region, scope), file_range.offset
            if name == "fallocate":
                kw["flags"] = w.flags(ops.FALLOCATE_WORDS)
        case "clear_refs":
            kw["flags"] = number(w.take("the level, 1 to 5"))
        case "shmat":
            length = size(w.take("the number of pages"))
            if w.left and w.left[0] == "at":
                w.take("at")
                place = place_of(w.take("the place after `at`"), scope)
            kw["prot"] = rights(w.take("the protection (r, rw, rx, rwx)"))
            kw["flags"] = w.flags(ops.SHMAT_WORDS)
        case "rlimit":
            word = w.take("the resource")
            if word not in ops.RLIMIT_WORDS:
                raise BadLineError(f"no resource {word!r}; known: {' '.join(ops.RLIMIT_WORDS)}")
            kw["flags"] = ops.RLIMIT_WORDS[word]
            word = w.take("the number of pages, or unlimited")
            length = ops.UNLIMITED if word == "unlimited" else size(word)
    w.end()
    return Op(name, proc, result, place, length, **kw)  # type: ignore[arg-type]


def _expectation(proc: str, words: list[str], scope: Scope | None) -> Expectation:
    w = Words(words)
    kind = w.take("what is expected")
    place: Place | None = None
    length = value = 0
    said: tuple[str, ...] = ()
    match kind:
        case "faults":
            value = number(w.take("the number of faults"))
        case "result":
            word = w.take("the result: ok, a number, a place or an errno name")
            if word == "ok":
                said = ("ok",)
            elif re.match(r"-?\d|0x", word) and "[" not in word:
                value = number(word)
            elif word.startswith("E") and hasattr(errno, word):
                value = -int(getattr(errno, word))
            else:
                place = place_of(word, scope)
        case "signal":
            word = w.take("the signal: SEGV, BUS or none")
            if word != "none" and word not in ops.SIGNALS:
                raise BadLineError(f"no signal {word!r}; known: none {' '.join(ops.SIGNALS)}")
            said = (word,)
            if w.left:
                code = w.take("si_code")
                codes = ops.SI_CODES.get(word, {})
                if not code.isdigit() and code.removeprefix(f"{word}_") not in codes:
                    known = " ".join(codes) or "numbers"
                    raise BadLineError(f"no si_code {code!r} of {word}; known: {known}")
                value = codes.get(code.removeprefix(f"{word}_")) or number(code)
        case "vmas" | "pages":
            if kind == "pages":
                said = (w.take("a page state"),)
                _page_word(said[0])
            value = number(w.take("the number"))
            if w.left:
                if w.take("in") != "in":
                    raise BadLineError("a range follows `in`")
                place, length = range_of(w.take("the range after `in`"), scope)
        case "vma":
            place, length = range_of(w.take("the range of the vma"), scope)
            perms = w.take("its permissions, as in maps: rw-p")
            if not re.match(r"[r-][w-][x-][ps]$", perms):
                raise BadLineError(f"not permissions: {perms!r} (example: rw-p)")
            said = (perms,)
        case "page":
            place, length = range_of(w.take("the page"), scope)
            said = tuple(w.left)
            if not said:
                raise BadLineError("the page's state is missing")
            for word in said:
                _page_word(word)
            w.left = []
        case "smaps":
            place, length = range_of(w.take("the range"), scope)
            said = (w.take("the field"),)
            value = number(w.take("the figure in kB"))
        case _:
            raise BadLineError(f"cannot expect {kind!r}; known: {' '.join(EXPECTATIONS)}")
    w.end()
    return Expectation(kind, proc, value, said, place, length)


def _page_word(word: str) -> None:
    if word.removeprefix("!") not in _PAGE_WORDS:
        raise BadLineError(
            f"no page state {word!r}; known: {' '.join(sorted(_PAGE_WORDS))}, each also with !"
        )
