"""The reference model's state as a MiniMm, and what two of them differ in.

Frames are compared by what they are (the zero page, page 3 of file f, the frame that page P had before, a new
one), because which number a new frame has is no rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pagelens.lab.mini import PAGE, VM, ZERO_FRAME, Frames, MiniMm, Pte, Vma, Vmas
from pagelens.model.abi import AE, FRAME_SHIFT, ZERO, P, W
from pagelens.model.area import Area
from pagelens.model.frames import F_ANON
from pagelens.model.op import ARENA_BASE, ARENA_PAGES
from pagelens.model.process import Process
from pagelens.model.profile import Profile
from pagelens.model.runner import ModelWorld

_KNOWN = sum(f.value for f in VM)


def rules(profile: Profile) -> frozenset[str]:
    """The names of the profile's rules that hold."""
    return frozenset(rule for rule in profile.rules() if getattr(profile, rule))


def view(world: ModelWorld, process: Process) -> MiniMm:
    """A process of the reference, without the harness of the oracle."""
    frames = Frames()
    mm = MiniMm(frames)
    harness = {start for start, _ in world.setting.harness} if world.setting.region_pages else set[int]()
    names = _Names()
    model = process.mm
    areas = [a for a in model.areas if a.start not in harness]
    mm.vmas = Vmas(_vma(a, names) for a in areas)
    mm.brk, mm.start_brk, mm.mmap_base = model.brk, model.start_brk, model.layout.mmap_base
    mm.max_map_count = world.machine.max_map_count - (model.map_count - len(areas))
    mm.rules = rules(model.profile)
    entries: dict[int, Pte] = {}
    for area in areas:
        for first, chunk, part in model.tables.spans(area.start // PAGE, area.end // PAGE):
            for i in np.flatnonzero(chunk.pte[part] & np.uint64(P)).tolist():
                entries[first + i] = _pte(int(chunk.pte[part][i]))
    mm.ptes.load(entries)
    table = world.machine.frames
    for pte in entries.values():
        if pte.frame != ZERO_FRAME:
            frames.mapcount[pte.frame] = int(table.mapcount[pte.frame])
            if table.flags[pte.frame] & F_ANON:
                frames.anon.add(pte.frame)
    for area in areas:
        if area.file is not None:
            name = names.file(area)
            frames.cache[name] = dict(area.file.pages)
            frames.sizes[name] = area.file.n_pages
    return mm


class _Names:
    # Numbers for anon_vmas, names for files.
    def __init__(self) -> None:
        self._anon: dict[int, int] = {}

    def anon(self, area: Area) -> int:
        return 0 if area.anon_vma is None else self._anon.setdefault(id(area.anon_vma), len(self._anon) + 1)

    @staticmethod
    def file(area: Area) -> str:
        if area.file is None:
            return ""
        return f"shmem#{area.file.inode}" if area.file.name.startswith("/dev/zero") else area.file.name


def _vma(area: Area, names: _Names) -> Vma:
    forked = area.anon_vma is not None and len(area.chain) != 1
    pgoff = area.pgoff if area.file is not None else 0
    return Vma(
        area.start, area.end, VM(area.flags & _KNOWN), names.file(area), pgoff, names.anon(area), forked
    )


def _pte(pte: int) -> Pte:
    if pte & ZERO:
        return Pte(ZERO_FRAME)
    return Pte(pte >> FRAME_SHIFT, bool(pte & W), bool(pte & AE))


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be. subject: a vma, a page, the break, the answer."""

    subject: str
    expected: str
    got: str


def place_text(addr: int, heap: int) -> str:
    """An address as scenarios write it: arena[3], heap[2], or hexadecimal."""
    for name, base, size in (("arena", ARENA_BASE, ARENA_PAGES * PAGE), ("heap", heap, 1 << 30)):
        if base <= addr <= base + size:
            page, rest = divmod(addr - base, PAGE)
            return f"{name}[{page}]" + (f"+{rest}" if rest else "")
    return f"{addr:#x}"


def flag_text(flags: int) -> str:
    """ "rw-p account", the rest of the flags as words."""
    perms = "".join(c if flags & bit else "-" for c, bit in (("r", VM.READ), ("w", VM.WRITE), ("x", VM.EXEC)))
    known = VM(flags & _KNOWN)
    words = [f.name.lower() for f in VM if f in known and f > VM.SHARED and f.name]
    return " ".join([perms + ("s" if flags & VM.SHARED else "p"), *words])


def vma_text(vma: Vma, heap: int) -> str:
    """One vma in a line."""
    text = f"{place_text(vma.start, heap)}-{place_text(vma.end, heap)} {flag_text(int(vma.flags))}"
    if vma.file:
        text += f" {vma.file}[{vma.pgoff}]"
    return text + (" with an anon_vma" if vma.anon_vma else "")


def _key(vma: Vma) -> tuple[object, ...]:
    return vma.start, vma.end, int(vma.flags), vma.file, vma.pgoff, bool(vma.anon_vma)


class _Kinds:
    # What a frame is, relative to the state before the operation.
    def __init__(self, before: Iterable[MiniMm], mm: MiniMm) -> None:
        self._old = {pte.frame: page for b in before for page, pte in b.ptes.items()}
        self._file = {
            frame: f"page {index} of {file}"
            for file, pages in mm.frames.cache.items()
            for index, frame in pages.items()
        }

    def of(self, frame: int) -> tuple[str, object]:
        if frame == ZERO_FRAME:
            return "the zero page", 0
        if frame in self._file:
            return self._file[frame], 0
        if frame in self._old:
            return "the frame that it had", frame
        return "a new frame", 0


def _pte_text(pte: Pte | None, kinds: _Kinds, before: Pte | None) -> str:
    if pte is None:
        return "not present"
    kind, _ = kinds.of(pte.frame)
    if kind == "the frame that it had" and (before is None or before.frame != pte.frame):
        kind = "another page's old frame"
    words = [kind, "writable" if pte.writable else "read-only"]
    return ", ".join(words + (["exclusive"] if pte.exclusive else []))


def differences(before: MiniMm, expected: MiniMm, got: MiniMm) -> list[Difference]:
    """What `got` has otherwise than `expected`: vmas, then the break, then pages. `before`: the state that
    both began with."""
    heap = expected.start_brk
    out: list[Difference] = []
    ours, theirs = ({v.start: v for v in list.__iter__(m.vmas)} for m in (expected, got))
    for start in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(start), theirs.get(start)
        if a is None or b is None or _key(a) != _key(b):
            no = f"no vma starts at {place_text(start, heap)}"
            texts = vma_text(a, heap) if a else no, vma_text(b, heap) if b else no
            out.append(Difference("vma", *texts))
    if expected.brk != got.brk:
        out.append(Difference("the break", place_text(expected.brk, heap), place_text(got.brk, heap)))
    return out + _page_differences(before, expected, got, heap)


def _page_differences(before: MiniMm, expected: MiniMm, got: MiniMm, heap: int) -> list[Difference]:
    out: list[Difference] = []
    ours, theirs = _Kinds([before], expected), _Kinds([before], got)
    fresh: dict[int, int] = {}
    for page in sorted(set(expected.ptes) | set(got.ptes)):
        a, b, old = expected.ptes.get(page), got.ptes.get(page), before.ptes.get(page)
        same = (a is None) == (b is None)
        if same and a is not None and b is not None:
            same = (ours.of(a.frame), a.writable, a.exclusive) == (
                theirs.of(b.frame), b.writable, b.exclusive,
            )  # fmt: skip
        where = f"page {place_text(page * PAGE, heap)}"
        if not same:
            out.append(Difference(where, _pte_text(a, ours, old), _pte_text(b, theirs, old)))
        elif b is not None and theirs.of(b.frame)[0] == "a new frame":
            if b.frame not in got.frames.anon:
                out.append(Difference(where, "a frame of mm.new_frame()", f"the made-up frame {b.frame}"))
            elif b.frame in fresh:
                first = place_text(fresh[b.frame] * PAGE, heap)
                out.append(Difference(where, "a new frame of its own", f"the same new frame as {first}"))
            fresh[b.frame] = page
    return out


def missing_flush(before: MiniMm, got: MiniMm, heap: int) -> Difference | None:
    """The first page whose entry lost its frame or its write permission without a flush of the TLB."""
    for page, old in sorted(before.ptes.items()):
        new = got.ptes.get(page)
        why = ""
        if new is None:
            why = "is gone"
        elif new.frame != old.frame:
            why = "has another frame"
        elif old.writable and not new.writable:
            why = "lost its write permission"
        addr = page * PAGE
        if why and not any(start <= addr < end for start, end in got.flushes):
            return Difference(
                f"the TLB entry of page {place_text(addr, heap)}",
                f"flushed: the page-table entry {why}, and a processor may remember the old one",
                "no mm.flush_tlb that covers it",
            )
    return None
