"""Random programs for the exercises: short, in a small piece of the arena, where vmas touch all the time.

The campaign's own generator (`proof.randomprog`) knows every flag of Linux; a student's handler must not. So
this one uses only what an exercise tells of. Like that one it looks at the vmas that exist, and aims at edges.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from pagelens.model import op as ops
from pagelens.model.op import ARENA_BASE, Op, Place
from pagelens.model.runner import ModelWorld
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Vma

PAGES = 40  # of the arena that are used
_PROTS = (3,) * 10 + (1,) * 4 + (0, 0, 5, 2, 7)
_ADVICE = {"madvise": "dontneed", "dontfork": "dontfork", "wipeonfork": "wipeonfork"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """weights: operation (or "dontfork", "wipeonfork") -> weight. files: share of mmaps that map a file or
    shared memory. odd: share of calls with arguments that are refused or not whole pages. heap: fixed mappings
    go above the heap."""

    weights: Mapping[str, float]
    files: float = 0.1
    odd: float = 0.0
    heap: bool = False


class Programs:
    """An endless random program; the same seed gives the same."""

    def __init__(self, seed: str, recipe: Recipe) -> None:
        self.random = random.Random(seed)
        self.recipe = recipe
        self._names = list(recipe.weights)
        self._weights = list(recipe.weights.values())
        self._files: list[str] = []
        self._made = 0

    def next(self, world: ModelWorld) -> Op:
        """The next operation, by the vmas that `world` has now."""
        r = self.random
        procs = list(world.alive())
        for _ in range(50):
            proc = r.choice(procs)
            name = r.choices(self._names, self._weights)[0]
            op = self._make(name, proc, procs, list(world.vmas(proc)), world)
            if op is not None:
                return op
        return Op("mmap", procs[0], place=Place("arena"), length=PAGE_SIZE, prot=3, flags=0x32)

    def _name(self, kind: str) -> str:
        self._made += 1
        return f"{kind}{self._made}"

    def _make(self, name: str, proc: str, procs: list[str], vmas: list[Vma], world: ModelWorld) -> Op | None:
        r = self.random
        match name:
            case "mmap":
                return self._mmap(proc, vmas)
            case "brk":
                at = r.choice((0, 1, 2, 3, 4, 5, 7, 9, 12)) * PAGE_SIZE + r.choice((0, 0, 1, 100, 4095))
                if r.random() < 0.08:
                    at = -PAGE_SIZE
                return Op("brk", proc, place=Place("heap", at))
            case "fork":
                return Op(name, proc, self._name("q")) if len(procs) < 3 else None
            case "exit":
                return Op(name, proc) if len(procs) > 1 and proc != "main" else None
            case "memfd":
                if len(self._files) >= 2:
                    return None
                self._files.append(self._name("f"))
                return Op(name, proc, self._files[-1], length=r.choice((6, 20, 40)) * PAGE_SIZE)
            case "pwrite":
                if not self._files:
                    return None
                first = r.randrange(20) * PAGE_SIZE
                size = r.randint(1, 8) * PAGE_SIZE
                return Op(name, proc, length=size, file=r.choice(self._files), offset=first)
        if not vmas:
            return None
        vma = r.choice(vmas)
        if self.recipe.heap and name == "write":
            edge = world.names.regions["heap"] + r.randrange(12) * PAGE_SIZE
            return Op(name, proc, place=self._place(edge, world), length=PAGE_SIZE)
        if name in ops.ACCESSES:
            last = vma.pages - 1
            page = r.choice((0, last, last, r.randint(0, last), last + 1, -1))
            return Op(name, proc, place=self._place(vma.start + page * PAGE_SIZE, world), length=PAGE_SIZE)
        return self._ranged(name, proc, vma, world)

    def _ranged(self, name: str, proc: str, vma: Vma, world: ModelWorld) -> Op:
        r = self.random
        first = r.choice((0, 0, r.randrange(vma.pages), r.randrange(vma.pages), -1))
        last = r.choice((vma.pages, vma.pages, r.randint(0, vma.pages), vma.pages + r.randint(1, 4)))
        if last <= first:
            last = first + 1
        addr, length = vma.start + first * PAGE_SIZE, (last - first) * PAGE_SIZE
        if r.random() < self.recipe.odd:
            addr, length = r.choice(((addr + 1, length), (addr, length - 100), (addr, 0), (addr, length + 1)))
        place = self._place(addr, world)
        if name in _ADVICE:
            return Op("madvise", proc, place=place, length=length, flags=ops.ADVICE_WORDS[_ADVICE[name]])
        prot = r.choice(_PROTS) if name == "mprotect" else 0
        return Op(name, proc, place=place, length=length, prot=prot)

    def _place(self, addr: int, world: ModelWorld) -> Place:
        heap = world.names.regions["heap"]
        if ARENA_BASE - PAGE_SIZE <= addr <= ARENA_BASE + 1024 * PAGE_SIZE:
            return Place("arena", addr - ARENA_BASE)
        if heap - PAGE_SIZE <= addr <= heap + 1024 * PAGE_SIZE:
            return Place("heap", addr - heap)
        return Place("", addr)

    def _mmap(self, proc: str, vmas: list[Vma]) -> Op:
        r = self.random
        length = r.choice((1, 1, 2, 2, 3, 4, 6)) * PAGE_SIZE
        if self.recipe.heap:
            at = Place("heap", r.randint(3, 14) * PAGE_SIZE)
            return Op("mmap", proc, place=at, length=length, prot=r.choice((3, 1)), flags=0x32)
        prot, flags, file, offset = r.choice(_PROTS), ops.PRIVATE | ops.ANONYMOUS, "", 0
        if r.random() < self.recipe.files:
            flags = ops.SHARED | ops.ANONYMOUS
            if self._files:
                flags = r.choice((ops.SHARED, ops.PRIVATE))
                file, offset = r.choice(self._files), r.choice((0, 1, 2, r.randrange(24))) * PAGE_SIZE
        if flags & ops.PRIVATE and r.random() < 0.12:
            flags |= ops.MAP_WORDS["noreserve"]
        where = r.random()
        inside = [v for v in vmas if ARENA_BASE <= v.start < ARENA_BASE + PAGES * PAGE_SIZE]
        addr = ARENA_BASE + r.randrange(PAGES) * PAGE_SIZE
        if inside and where < 0.6:
            near = r.choice(inside)
            addr = max(r.choice((near.end, near.start - length)), ARENA_BASE)
            name = near.name.removeprefix("/memfd:").removesuffix(" (deleted)")
            if r.random() < 0.6:
                prot = int(near.prot)
                if name in self._files and not near.shared:
                    file, flags = name, ops.PRIVATE
                    offset = max(near.offset + addr - near.start, 0)
        place: Place | None = Place("arena", addr - ARENA_BASE)
        if where < 0.80:
            flags |= ops.MAP_WORDS["fixed"]
        elif where < 0.86:
            flags |= ops.MAP_WORDS["fixed_noreplace"]
        elif where < 0.93 or file:
            pass  # a hint
        else:
            place = None
        if r.random() < self.recipe.odd:
            kind = r.randrange(5)
            if kind == 0:
                length = 0
            elif kind == 1:
                length -= r.choice((1, 4000))
            elif kind == 2 and place is not None:
                place = place.moved(r.choice((1, 8)))
            elif kind == 3:
                flags &= ~3
            else:
                flags |= 3 if flags & ops.ANONYMOUS else 0
        return Op("mmap", proc, place=place, length=length, prot=prot, flags=flags, file=file, offset=offset)
