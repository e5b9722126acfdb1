"""Sequences at the edge of a limit: a page less than it leaves, all of it, a page more; by each call that takes any."""

from __future__ import annotations

from pagelens.model import op as ops
from pagelens.model.op import Op, Place
from pagelens.proof.ground import ANON, FAR_TABLES, Ground
from pagelens.vm.units import HPAGE_PAGES, HPAGE_SIZE, PAGE_SIZE

_ROOM = 100  # pages of the arena that a sequence clears for itself
_LIFTED = {"as": ops.UNLIMITED, "data": ops.UNLIMITED, "stack": 2048 * PAGE_SIZE, "memlock": 2048 * PAGE_SIZE}


def at_a_limit(g: Ground) -> list[Op]:
    """One limit that leaves 0 to 5 pages, and 1 to 3 calls that ask for about as many."""
    r = g.random
    if not g.calm:
        return []
    what = r.choice(("as", "data", "data", "stack", *(("memlock",) if g.locks else ())))
    spare = r.randint(0, 5)
    asked = max(1, spare + r.choice((-1, 0, 0, 1, 1)))
    if what == "stack":
        return _stack(g, spare, asked)
    if what == "data" and g.room and r.random() < 0.4:
        return _heap(g, spare + 1)
    at = g.spot(_ROOM)
    takes = _takes(g, at, asked) + (_locks(g, at, asked) if what == "memlock" else [])
    r.shuffle(takes)
    return [
        g.on("munmap", at, _ROOM),
        *_mapped(g, at),
        *([Op("munlockall", g.proc)] if what == "memlock" else []),
        _limit(g, what, (_used(g, what, at) + spare) * PAGE_SIZE),
        *takes[: r.randint(1, 3)],
        _limit(g, what, _LIFTED[what]),
    ]


def _limit(g: Ground, what: str, length: int) -> Op:
    return Op("rlimit", g.proc, length=length, flags=ops.RLIMIT_WORDS[what])


def _mapped(g: Ground, at: int) -> list[Op]:
    # 12 pages that RLIMIT_AS counts, 4 of them RLIMIT_DATA.
    return [g.map(at, 4), g.map(at + 50 * PAGE_SIZE, 8, 1)]


def _used(g: Ground, what: str, at: int) -> int:
    # Pages that count before the calls: nearly always right (maps does not tell stacks from data).
    if what == "memlock":
        return 0
    end = at + _ROOM * PAGE_SIZE
    data = what == "data"
    kept = 4 if data else 12 + g.harness
    for vma in g.vmas:
        if not data or (vma.prot & 2 and not vma.shared):
            cut = max(0, min(vma.end, end) - max(vma.start, at))
            kept += (vma.end - vma.start - cut) // PAGE_SIZE
    return kept


def _takes(g: Ground, at: int, asked: int) -> list[Op]:
    # What asks for more of both.
    r = g.random
    size = asked * PAGE_SIZE
    low, high = at, at + 50 * PAGE_SIZE
    stack = r.choice((0, ops.MAP_WORDS["stack"]))
    grown = Op(
        "mremap",
        g.proc,
        g.name("m"),
        g.at(low),
        4 * PAGE_SIZE,
        0,
        r.choice((0, 1)),
        None,
        4 * PAGE_SIZE + size,
    )
    return [
        g.map(at + 20 * PAGE_SIZE, asked),
        g.map(at + 40 * PAGE_SIZE, asked, 3, ANON | stack),
        g.on("mprotect", high, asked, prot=3),
        grown,
        g.move(high, asked, at + 30 * PAGE_SIZE, 7),
        Op("brk", g.proc, place=Place("heap", size)),
    ]


def _locks(g: Ground, at: int, asked: int) -> list[Op]:
    high = at + 50 * PAGE_SIZE
    flags = ops.PRIVATE | ops.ANONYMOUS | ops.MAP_WORDS["locked"]
    mapped = Op("mmap", g.proc, g.name("m"), None, asked * PAGE_SIZE, 3, flags)
    return [g.on("mlock", at, min(asked, 4)), g.on("mlock2", high, asked, flags=1), mapped] * 2


def _heap(g: Ground, pages: int) -> list[Op]:
    # All of RLIMIT_DATA for the heap, less some bytes: what the file has as data counts as well (check_data_rlimit).
    # Only a process that has nothing else can have that much.
    r = g.random
    child = g.name("p")
    size = pages * PAGE_SIZE
    less = r.choice((0, 0, 1, 1000, 2000, 2030, 2040, 3000, PAGE_SIZE - 1, PAGE_SIZE))
    return [
        Op("fork", g.proc, child),
        Op("execve", child),
        Op("rlimit", child, length=size, flags=ops.RLIMIT_WORDS["data"]),
        Op("brk", child, place=Place("heap", size - less)),
        Op("exit", child),
    ]


def _stack(g: Ground, spare: int, asked: int) -> list[Op]:
    # Far from everything: a stack keeps a gap of 256 pages below it.
    r = g.random
    top = FAR_TABLES + (1024 + 2 * r.randrange(4)) * HPAGE_SIZE
    clear = g.on("munmap", top - HPAGE_SIZE, HPAGE_PAGES + 2)
    return [
        clear,
        g.map(top, 2, 3, ANON | ops.MAP_WORDS["growsdown"]),
        _limit(g, "stack", (2 + spare) * PAGE_SIZE),
        g.on(r.choice(("write", "write", "read")), top - asked * PAGE_SIZE, 1),
        g.on("write", top - (asked + 1) * PAGE_SIZE, 1),
        _limit(g, "stack", _LIFTED["stack"]),
        *([clear] if r.random() < 0.7 else []),
    ]
