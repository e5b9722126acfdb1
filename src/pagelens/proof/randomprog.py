"""Random programs that go where rules meet: neighbours, splits, merges, forks, edges of ranges and of tables.

A generator looks at the vmas that exist now and picks the next operation, so that most operations succeed and
land next to something. What it yields is concrete: a program, once made, runs without it.

Rejected: uniformly random addresses (nearly everything fails with ENOMEM or maps alone in the void);
hypothesis (its shrinker cannot keep a kernel process in step, and a campaign needs millions of operations).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from pagelens.model import op as ops
from pagelens.model.op import ARENA_BASE, ARENA_MIDDLE, ARENA_PAGES, Op, Place
from pagelens.model.world import Names, World
from pagelens.proof.fileops import CHANGES, MAKES, Files
from pagelens.proof.ground import Ground
from pagelens.proof.mix import ADVICE, LIMITS, LOCKING, PROTS, WEIGHTS, Mix, far, huge
from pagelens.proof.recipes import RECIPES
from pagelens.proof.window import above_window
from pagelens.vm.units import HPAGE_PAGES, HPAGE_SIZE, PAGE_SIZE
from pagelens.vm.vma import Vma, VmaList

_ARENA_END = ARENA_BASE + ARENA_PAGES * PAGE_SIZE


class Generator:
    """An endless random program. The same seed against the same answers gives the same program."""

    def __init__(self, seed: int, mix: Mix | None = None) -> None:
        self.random = random.Random(seed)
        self.mix = mix or Mix()
        table = {**WEIGHTS, **self.mix.weights}
        self._prots = tuple(p for p in PROTS if p != 4 or "exec_only" not in self.mix.without)
        # A page that was locked waits in a per-CPU batch that holds a reference, and is then copied where it would be
        # reused; a read or write by pin shows it (docs/fidelity.md): programs with such do not lock.
        self._locks = self.random.random() < 0.6
        apart = {"peek", "poke"} if self._locks else LOCKING
        self._names = [n for n in table if n not in self.mix.without | apart]
        # Summed once: choices() would sum them each time, and draws the same.
        self._weights = list(accumulate(table[n] for n in self._names))
        advice = {a: w for a, w in ADVICE.items() if a not in self.mix.without}
        self._advice, self._advice_weights = list(advice), list(accumulate(advice.values()))
        self._files = Files(self.random, self._name)
        self._sizes: dict[str, int] = {}
        self._queue: list[Op] = []
        self._tight: dict[str, str] = {}
        self._counter = 0
        self._leaders: set[str] = set()
        self._far, self._huge = far(4), huge(4)

    def next(self, world: World) -> Op:
        """The next operation, chosen by the vmas that `world` has now."""
        r = self.random
        procs = list(world.alive())
        self._far, self._huge = far(world.setting.levels), huge(world.setting.levels)
        while self._queue:
            queued = self._queue.pop(0)
            if queued.proc in procs:
                return queued
        self._leaders = {p for p in procs if world.is_leader(p)}
        proc = r.choice(procs)
        vmas = world.vmas(proc)
        if r.random() < 0.145:
            self._queue = self._recipe(proc, procs, vmas, world)
            if self._queue:
                return self._queue.pop(0)
        while True:
            if len(vmas) < 4 and r.random() < 0.5:
                name = "mmap"
            else:
                name = r.choices(self._names, cum_weights=self._weights)[0]
            if len(vmas) > 40 and r.random() < 0.3:
                name = "munmap"
            op = self._make(name, proc, procs, vmas, world.names)
            if op is not None:
                return op

    def _recipe(self, proc: str, procs: list[str], vmas: VmaList, world: World) -> list[Op]:
        r = self.random
        recipe: Callable[[Ground], list[Op]] = above_window
        if world.setting.levels == 4 or r.random() >= 0.15:
            names_of = list(RECIPES)
            recipe, _ = RECIPES[r.choices(names_of, [RECIPES[n][1] for n in names_of])[0]]
        ground = Ground(
            r, proc, vmas, self._place, self._name, world.names, self._locks,
            len(procs) < self.mix.processes, not self._tight, tuple(self._files.sizes),
            {name: self._files.sizes[name] for name in self._files.disks},
            sum(end - start for start, end in world.setting.harness) // PAGE_SIZE,
        )  # fmt: skip
        return [op for op in recipe(ground) if op.name not in self.mix.without]

    def _name(self, prefix: str) -> str:
        self._counter += 1
        return f"{prefix}{self._counter}"

    # -- places

    def _place(self, addr: int, names: Names) -> Place:
        # Named where possible, so that a kept program still means the same where mmap places differently.
        if ARENA_BASE - (64 << 20) <= addr < _ARENA_END + (64 << 20):
            return Place("arena", addr - ARENA_BASE)
        heap = names.regions["heap"]
        if heap <= addr < heap + (16 << 20):
            return Place("heap", addr - heap)
        for name in reversed(names.regions):
            base = names.regions[name]
            if base <= addr <= base + self._sizes.get(name, 0):
                return Place(name, addr - base)
        return Place("", addr)

    def _count(self) -> int:
        r = self.random
        return r.choices((1, 2, 3, 4, r.randint(5, 16), r.randint(17, 80)), (6, 6, 4, 4, 4, 1))[0]

    def _range(self, vmas: Sequence[Vma]) -> tuple[int, int]:
        # A range that touches, cuts or just misses the edges of a vma; sometimes over several.
        r = self.random
        if not vmas or r.random() < 0.03:
            edge = ARENA_MIDDLE if r.random() < 0.5 else ARENA_BASE + r.randrange(ARENA_PAGES) * PAGE_SIZE
            count = self._count()
            return edge - r.randint(0, count) * PAGE_SIZE, count * PAGE_SIZE
        large = [v for v in vmas if v.pages >= HPAGE_PAGES] if r.random() < 0.06 else None
        vma = r.choice(large or vmas)
        pages = vma.pages
        table = -(-vma.start // HPAGE_SIZE) * HPAGE_SIZE
        if table + HPAGE_SIZE <= vma.end and r.random() < 0.3:
            return table, HPAGE_SIZE  # exactly what one page table covers
        kind = r.random()
        if kind < 0.30:
            first, last = 0, pages
        elif kind < 0.45:
            first, last = 0, r.randint(1, min(pages, 16))
        elif kind < 0.60:
            first, last = pages - r.randint(1, min(pages, 16)), pages
        elif kind < 0.90:
            first = r.randrange(pages)
            last = min(pages, first + self._count())
        elif kind < 0.95:
            first, last = r.randrange(pages), pages + r.randint(1, 4)
        else:
            first, last = -r.randint(1, 4), r.randint(1, pages)
        return vma.start + first * PAGE_SIZE, (last - first) * PAGE_SIZE

    def _target(self, length: int, vmas: Sequence[Vma]) -> int:
        # Where a fixed mapping goes: against a neighbour, across the tables' edge, or anywhere in the arena.
        r = self.random
        inside = [v for v in vmas if v.start >= ARENA_BASE and v.end <= _ARENA_END]
        kind = r.random()
        if inside and kind < 0.65:
            vma = r.choice(inside)
            addr = r.choice((vma.end, vma.start - length, vma.end, vma.start - length, vma.start))
        elif kind < 0.75:
            addr = ARENA_MIDDLE - r.randint(0, length // PAGE_SIZE) * PAGE_SIZE
        else:
            addr = ARENA_BASE + r.randrange(ARENA_PAGES) * PAGE_SIZE
        return max(ARENA_BASE, min(addr, _ARENA_END - length))

    # -- operations

    def _make(self, name: str, proc: str, procs: list[str], vmas: VmaList, names: Names) -> Op | None:
        r = self.random
        if name in MAKES:
            return self._files.make(name, proc)
        if name in CHANGES:
            return self._files.change(name, proc)
        match name:
            case "mmap":
                return self._mmap(proc, vmas, names)
            case "brk":
                at = names.regions["heap"] + r.choice((0, 1, 2, 3, 5, 8, 13, 30)) * PAGE_SIZE
                odd = r.choice((0, 0, 0, 1, 100, 4095, -PAGE_SIZE)) if r.random() < 0.97 else 1 << 40
                return Op("brk", proc, place=self._place(at + odd, names))
            case "mlockall":
                return Op(name, proc, flags=r.choice((1, 1, 2, 3, 5, 6, 7, 4)))
            case "munlockall":
                return Op(name, proc)
            case "fork":
                return Op(name, proc, self._name("p")) if len(procs) < self.mix.processes else None
            case "thread":
                return Op(name, proc, self._name("t")) if len(procs) < self.mix.processes else None
            case "exit":
                # The last process stays: with it its threads would go, and nobody be left.
                return Op(name, proc) if self._leaders > {proc} or proc not in self._leaders else None
            case "execve":
                # Mostly by children: what main has made is what the others were copied from.
                rare = proc == "main" and r.random() < 0.8
                return None if rare or self._tight or proc not in self._leaders else Op(name, proc)
            case "clear_refs":
                return Op(name, proc, flags=r.choice((4, 4, 4, 1, 2, 3, 5, 6)))
            case "rlimit":
                return self._rlimit(proc)
            case "uncap":
                # Capabilities are a thread's own; the model knows processes.
                return Op(name, proc) if len(self._leaders) == len(procs) else None
            case "shmat":
                return self._shmat(proc, vmas, names)
        if not vmas:
            return None
        addr, length = self._range(vmas)
        heap = names.regions["heap"]
        if addr < heap:
            # The heap starts right behind the text of the child, which must live.
            addr, length = heap, max(length - (heap - addr), PAGE_SIZE)
        if name in ("peek", "poke"):
            odd = r.choice((0, 0, 0, 1, 4000))
            return Op(name, proc, place=self._place(addr + odd, names), length=min(length, 64 * PAGE_SIZE))
        if name in ops.ACCESSES:
            pages = length // PAGE_SIZE
            if r.random() < 0.6:
                pages = min(pages, r.choice((1, 1, 1, 2, 3)))
            return Op(name, proc, place=self._place(addr, names), length=min(pages, 64) * PAGE_SIZE)
        if r.random() < 0.03:
            addr += r.choice((1, 8, 2048))
        elif r.random() < 0.03:
            length += r.choice((1, -1, 100))
        elif r.random() < 0.01:
            length = 0
        elif r.random() < 0.01:
            length = r.choice(self._huge)
            if addr < ARENA_BASE // 2:
                length = self._huge[-3]  # the harness lies above the heap, and must not be advised
        elif r.random() < 0.005:
            return self._ranged(
                Op(name, proc, place=Place("", r.choice(self._far)), length=PAGE_SIZE), vmas, names
            )
        op = Op(name, proc, place=self._place(addr, names), length=max(length, 0))
        return self._ranged(op, vmas, names)

    def _ranged(self, op: Op, vmas: VmaList, names: Names) -> Op:
        r = self.random
        common = {"name": op.name, "proc": op.proc, "place": op.place, "length": op.length}
        match op.name:
            case "mprotect":
                odd = r.choices((0, 0x0100_0000, 0x0200_0000, 0x0300_0000, 8, 16), (90, 6, 1, 1, 1, 1))[0]
                return Op(**common, prot=r.choice(self._prots) | odd)  # type: ignore[arg-type]
            case "madvise":
                word = r.choices(self._advice, cum_weights=self._advice_weights)[0]
                if op.length == HPAGE_SIZE and r.random() < 0.5 and "dontneed" in self._advice:
                    word = "dontneed"  # may free the table itself (PT_RECLAIM)
                if word.startswith("populate") and r.random() < 0.4:
                    op = self._over_hole(op, vmas, names)
                if word == "remove" and _on_disk(op, vmas, names):
                    word = "dontneed"  # see Files: none of its pages may go
                advice = ops.ADVICE_WORDS[word] if r.random() < 0.99 else r.choice((5, 7, 26, 99, 104))
                return replace(op, flags=advice)
            case "mlock2":
                return Op(**common, flags=r.choice((0, 1, 1, 1, 2)))  # type: ignore[arg-type]
            case "msync":
                return Op(**common, flags=r.choice((1, 4, 4, 2, 6, 5, 0)))  # type: ignore[arg-type]
            case "mremap":
                return self._mremap(op, vmas, names)
        return op

    def _over_hole(self, op: Op, vmas: VmaList, names: Names) -> Op:
        # The range goes from one vma over a hole into the next, where there is a small one.
        gaps = [(a, b) for a, b in pairwise(vmas) if a.end < b.start <= a.end + 64 * PAGE_SIZE]
        if not gaps:
            return op
        a, b = self.random.choice(gaps)
        start = max(a.start, a.end - 4 * PAGE_SIZE)
        return replace(op, place=self._place(start, names), length=b.start + PAGE_SIZE - start)

    def _mremap(self, op: Op, vmas: VmaList, names: Names) -> Op:
        r = self.random
        pages = max(op.length // PAGE_SIZE, 0)
        new = max(1, pages + r.choice((0, 0, 1, 2, 5, 16, -1, -2, -5)))
        flags = r.choice((0, 1, 1, 1, 3, 3, 3, 5, 7, 7))
        if r.random() < 0.02:
            flags = r.choice((2, 4, 6, 8, 9))
        target = None
        if flags & 2 or r.random() < 0.05:
            target = self._place(self._target(new * PAGE_SIZE, vmas), names)
        if flags & 4 and r.random() < 0.9:
            new = pages
        result = self._name("m")
        self._sizes[result] = new * PAGE_SIZE
        size = new * PAGE_SIZE if r.random() < 0.98 else r.choice((0, new * PAGE_SIZE - 1, *self._huge))
        return Op("mremap", op.proc, result, op.place, op.length, 0, flags, target, size)

    def _mmap(self, proc: str, vmas: VmaList, names: Names) -> Op:
        r = self.random
        pages = self._count()
        result = self._name("m")
        prot = r.choice(self._prots)
        kind = r.random()
        file, offset = "", 0
        if kind < 0.60 or (kind >= 0.70 and not self._files.sizes):
            flags = ops.PRIVATE | ops.ANONYMOUS
        elif kind < 0.70:
            flags = ops.SHARED | ops.ANONYMOUS
        else:
            flags = ops.PRIVATE if kind < 0.85 else ops.SHARED
            file = r.choice(list(self._files.sizes))
            offset = r.choice((0, 0, 1, 2, 4, r.randint(0, 40))) * PAGE_SIZE
        for word, chance in (
            ("populate", 0.06), ("noreserve", 0.05), ("growsdown", 0.04), ("stack", 0.07), ("locked", 0.02),
        ):  # fmt: skip
            if r.random() < chance and (self._locks or word != "locked"):
                flags |= ops.MAP_WORDS[word]
        if r.random() < 0.11 and not file:
            flags = (flags & ~3) | ops.MAP_WORDS["droppable"] | ops.ANONYMOUS
        place: Place | None = None
        where = r.random()
        if where < 0.015:
            pages = HPAGE_PAGES
            flags |= ops.MAP_WORDS["fixed"]
            place = self._place(ARENA_MIDDLE, names)
        elif where < 0.72:
            addr = self._target(pages * PAGE_SIZE, vmas)
            flags |= ops.MAP_WORDS["fixed"] if where < 0.64 else ops.MAP_WORDS["fixed_noreplace"]
            neighbour = next((v for v in vmas if v.end == addr or v.start == addr + pages * PAGE_SIZE), None)
            if neighbour is not None and r.random() < 0.7:
                prot, file, offset, flags = self._like(neighbour, addr, flags)
            place = self._place(addr, names)
        elif where < 0.80:
            # A hint that is not fixed: beside or on top of something.
            place = self._place(self._target(pages * PAGE_SIZE, vmas) + r.choice((0, 0, 5)), names)
        elif where < 0.90 and not flags & ops.MAP_WORDS["populate"]:
            pages = r.choice((511, 512, 513, 1024))
        length = pages * PAGE_SIZE
        odd = r.random()
        if odd < 0.02:
            length -= r.choice((1, 4000))
        elif odd < 0.03:
            length = r.choice((0, *self._huge))
        elif odd < 0.04:
            flags |= r.choice((ops.MAP_WORDS["32bit"], 3, 0x0400_0000, 1 << r.randint(19, 30)))
        elif file and odd < 0.14:
            flags |= r.choice((3, 3, 0x83, 0x83, 3 | 1 << r.randint(4, 30)))
        elif odd > 0.995 and not flags & ops.MAP_WORDS["fixed"]:
            place = Place("", r.choice(self._far))
        elif odd > 0.99:
            offset += r.choice((1, 100))
        self._sizes[result] = pages * PAGE_SIZE
        return Op("mmap", proc, result, place, length, prot, flags, file=file, offset=offset)

    def _shmat(self, proc: str, vmas: VmaList, names: Names) -> Op:
        r = self.random
        pages = r.choice((2, 3, 4, 4, 6, 8))
        result = self._name("s")
        place: Place | None = None
        flags = 0
        if r.random() < 0.8:
            addr = self._target(pages * PAGE_SIZE, vmas)
            flags = r.choices((0, 0x4000, 0x2000), (3, 6, 1))[0]
            place = self._place(addr + (r.choice((0, 0, 1, 100)) if flags & 0x2000 else 0), names)
        self._sizes[result] = pages * PAGE_SIZE
        return Op("shmat", proc, result, place, pages * PAGE_SIZE, r.choice((3, 3, 3, 3, 1, 7)), flags)

    def _rlimit(self, proc: str) -> Op:
        # A limit that holds is lifted before another is set.
        r = self.random
        tight = self._tight.pop(proc, "")
        what = tight or r.choice(list(LIMITS))
        limit = LIMITS[what][-1] if tight else r.choice(LIMITS[what])
        if what == "memlock" and tight:
            limit = 2048
        if not tight:
            self._tight[proc] = what
        length = ops.UNLIMITED if limit is None else limit * PAGE_SIZE
        return Op("rlimit", proc, length=length, flags=ops.RLIMIT_WORDS[what])

    def _like(self, near: Vma, addr: int, flags: int) -> tuple[int, str, int, int]:
        # The same kind as the neighbour, so that they may merge.
        kind = ops.SHARED if near.shared else ops.PRIVATE
        flags &= ~(3 | ops.ANONYMOUS)
        name = near.name.removeprefix("/memfd:").removeprefix("/disk:").removesuffix(" (deleted)")
        if name in self._files.sizes:
            wanted = near.offset + (addr - near.start)
            return int(near.prot), name, max(wanted, 0), flags | kind
        return int(near.prot), "", 0, flags | kind | ops.ANONYMOUS


def _on_disk(op: Op, vmas: Sequence[Vma], names: Names) -> bool:
    # Whether the range touches a mapping of a file on disk.
    assert op.place is not None
    start = names.resolve(op.place)
    end = start + op.length
    return any(v.name.startswith("/disk:") and v.start < end and start < v.end for v in vmas)
