"""The exercises: what the student writes, which operations of a program are graded, and on which programs.

An exercise hands over the calls that an operation means for the student's function, and says what answer is
right. The reference's answer comes from the model, held against this kernel by `grade`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagelens.lab import mini, wire
from pagelens.lab.mini import PAGE, PF_INSTR, PF_PROT, PF_USER, PF_WRITE, VM, MiniMm, Vma
from pagelens.lab.programs import Recipe
from pagelens.lab.texts import TEXTS, Text
from pagelens.model.op import ACCESSES, ADVICE_WORDS, ANONYMOUS, PRIVATE, SHARED, Op, Outcome
from pagelens.model.runner import ModelWorld

_SIGNALS = {(11, 1): mini.SEGV_MAPERR, (11, 2): mini.SEGV_ACCERR, (7, 2): mini.BUS_ADRERR}


@dataclass(slots=True)
class Call:
    """One call of the student's function. args: behind `mm`; a vma goes as {"vma": row}, the empty child as
    {"child": true}. text: how it is shown. answer: the right result, given what the reference and the state
    after it are. state: whether the address space afterwards is compared. most: how many vmas may be looked
    at."""

    args: list[Any]
    text: str
    answer: Callable[[Outcome, MiniMm], Any]
    state: bool = True
    child: str = ""
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Exercise:
    """name: as on the command line. function: what the file must define. fixed: scenarios, each (title, text).
    recipe: what random programs are made of. withheld: helpers of MiniMm that are the exercise itself.
    limit: vmas allowed in the scenario of that title (then the kernel, whose limit is another, is not asked).
    """

    name: str
    text: Text
    calls: Callable[[ModelWorld, Op, MiniMm], list[Call]]
    recipe: Recipe
    withheld: frozenset[str] = frozenset()
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def function(self) -> str:
        """The function's name."""
        return self.text.function


def _result(outcome: Outcome, _after: MiniMm) -> Any:
    return outcome.result


def _access_answer(outcome: Outcome, _after: MiniMm) -> Any:
    # A fetch from a page that may not be executed is two faults if the page is absent: one that brings it, one
    # that is refused. It is the first that is asked about.
    if outcome.faults or not outcome.signal:
        return mini.MINOR
    return _SIGNALS.get((outcome.signal, outcome.code), f"signal {outcome.signal} code {outcome.code}")


def _page_addr(world: ModelWorld, op: Op, mm: MiniMm) -> int:
    # Some byte of the page, always the same of one page: the first behind a vma, the last of one, others.
    assert op.place is not None
    page = world.names.resolve(op.place) // PAGE
    ends = {v.end // PAGE for v in list.__iter__(mm.vmas)}
    if page in ends:
        return page * PAGE
    return page * PAGE + (PAGE - 1 if page + 1 in ends else (0, PAGE - 1, 8, 2049)[page % 4])


def _error_code(op: Op, mm: MiniMm, addr: int) -> int | None:
    # What the processor says of this access; None where it lets it through.
    code = PF_USER | {"write": PF_WRITE, "exec": PF_INSTR}.get(op.name, 0)
    vma, pte = mm.vma_at(addr), mm.ptes.get(addr // PAGE)
    if pte is None or vma is None or not vma.flags & (VM.READ | VM.WRITE | VM.EXEC):
        return code
    allowed = {"write": pte.writable, "exec": bool(vma.flags & VM.EXEC)}.get(op.name, True)
    return None if allowed else code | PF_PROT


def _fault(world: ModelWorld, op: Op, mm: MiniMm) -> list[Call]:
    if op.name not in ACCESSES or op.length != PAGE:
        return []
    addr = _page_addr(world, op, mm)
    code = _error_code(op, mm, addr)
    vma = mm.vma_at(addr)
    if code is None or (vma is not None and vma.file):
        return []
    return [Call([addr, code], f"fault at {addr:#x}, error code {code:#x}", _access_answer)]


def _file_fault(world: ModelWorld, op: Op, mm: MiniMm) -> list[Call]:
    if op.name not in ("read", "write") or op.length != PAGE:
        return []
    addr = _page_addr(world, op, mm)
    code, vma = _error_code(op, mm, addr), mm.vma_at(addr)
    if code is None or vma is None or not vma.file:
        return []
    write = op.name == "write"
    if not vma.flags & VM.WRITE if write else not vma.flags & (VM.READ | VM.WRITE | VM.EXEC):
        return []
    args = [{"vma": wire.dump_vma(vma)}, addr, write]
    return [Call(args, f"{op.name} fault at {addr:#x} of {vma.file}", _access_answer)]


def _find_vma(world: ModelWorld, op: Op, mm: MiniMm) -> list[Call]:
    if op.name not in ACCESSES:
        return []
    most = 4 * max(len(mm.vmas), 1).bit_length() + 16
    calls = []
    addr = _page_addr(world, op, mm)
    for at in (addr, addr // PAGE * PAGE, addr // PAGE * PAGE + PAGE):

        def answer(_outcome: Outcome, _after: MiniMm, at: int = at) -> Any:
            vma = mm.find_vma(at)
            return None if vma is None else {"vma": wire.dump_vma(vma)}

        calls.append(Call([at], f"find_vma({at:#x})", answer, state=False, most=most))
    return calls


def _brk(world: ModelWorld, op: Op, _mm: MiniMm) -> list[Call]:
    if op.name != "brk" or op.place is None:
        return []
    addr = world.names.resolve(op.place)
    return [Call([addr], f"brk({addr:#x})", _result)]


def new_vma(op: Op, addr: int, mm: MiniMm, world: ModelWorld) -> Vma:
    """The vma that mmap would make at addr if it merged with nothing."""
    flags = VM(op.prot & 7)
    file, pgoff = "", 0
    if op.file:
        file, pgoff = world.files[op.file].name, op.offset // PAGE
    if op.flags & 3 == SHARED:
        flags |= VM.SHARED
        if not op.file:
            file = f"shmem#{mm.frames.new()}"
    if op.flags & 0x4000:
        flags |= VM.NORESERVE
    elif flags & VM.WRITE and not flags & VM.SHARED:
        flags |= VM.ACCOUNT
    return Vma(addr, addr + op.length, flags, file, pgoff)


def _can_merge(world: ModelWorld, op: Op, mm: MiniMm) -> list[Call]:
    # Only where exactly one neighbour touches: then what mmap did to it is the answer.
    if op.name != "mmap" or op.place is None or not op.flags & 0x10 or op.length % PAGE or not op.length:
        return []
    addr = world.names.resolve(op.place)
    end = addr + op.length
    if addr % PAGE or mm.overlapping(addr, end):
        return []
    touching = [v for v in list.__iter__(mm.vmas) if v.end == addr or v.start == end]
    if len(touching) != 1:
        return []
    near, new = touching[0], new_vma(op, addr, mm, world)

    def answer(_outcome: Outcome, after: MiniMm) -> bool:
        vma = after.vma_at(addr)
        return vma is not None and vma.start <= near.start and near.end <= vma.end

    side = "before" if near.end == addr else "behind"
    args = [{"vma": wire.dump_vma(near)}, {"vma": wire.dump_vma(new)}]
    return [Call(args, f"a new vma with a neighbour {side} it", answer, state=False)]


def _mmap(world: ModelWorld, op: Op, _mm: MiniMm) -> list[Call]:
    if op.name != "mmap" or op.file or (op.flags & ANONYMOUS and op.flags & 3 not in (0, PRIVATE, 3)):
        return []
    addr = world.names.resolve(op.place) if op.place is not None else 0
    text = f"mmap({addr:#x}, {op.length:#x}, prot {op.prot}, flags {op.flags:#x})"
    return [Call([addr, op.length, op.prot, op.flags], text, _result)]


def _ranged(name: str, *, prot: bool = False) -> Callable[[ModelWorld, Op, MiniMm], list[Call]]:
    def calls(world: ModelWorld, op: Op, _mm: MiniMm) -> list[Call]:
        if op.name != name or op.place is None:
            return []
        if name == "madvise" and op.flags != ADVICE_WORDS["dontneed"]:
            return []
        args = [world.names.resolve(op.place), op.length] + ([op.prot] if prot else [])
        shown = ", ".join(f"{a:#x}" for a in args)
        return [Call(list(args), f"{'dontneed' if name == 'madvise' else name}({shown})", _result)]

    return calls


def _fork(_world: ModelWorld, op: Op, _mm: MiniMm) -> list[Call]:
    if op.name != "fork":
        return []
    return [Call([{"child": True}], "fork", lambda _outcome, _after: None, child=op.result)]


def _all() -> Iterator[Exercise]:
    memory = {"mmap": 6.0, "munmap": 3.0, "mprotect": 5.0, "write": 12.0, "read": 9.0}
    several = {"fork": 0.7, "exit": 0.7}
    yield Exercise(
        "find-vma", TEXTS["find-vma"], _find_vma,
        Recipe({"mmap": 8, "munmap": 3, "mprotect": 2, "read": 12}), frozenset({"find_vma"}),
    )  # fmt: skip
    yield Exercise("fault", TEXTS["fault"], _fault, Recipe({**memory, **several, "exec": 2.0}))
    yield Exercise(
        "file-fault", TEXTS["file-fault"], _file_fault,
        Recipe({**memory, **several, "memfd": 1.0, "pwrite": 2.0}, files=0.8),
    )  # fmt: skip
    yield Exercise("brk", TEXTS["brk"], _brk, Recipe({"brk": 12, "write": 3, "mmap": 0.7}, heap=True))
    yield Exercise(
        "merge", TEXTS["merge"], _can_merge,
        Recipe({"mmap": 14, "munmap": 6, "mprotect": 1, "write": 4, "memfd": 0.7, **several}, files=0.3),
    )  # fmt: skip
    yield Exercise(
        "mmap", TEXTS["mmap"], _mmap,
        Recipe({"mmap": 12, "munmap": 2, "mprotect": 1, "write": 5, "read": 2, **several}, odd=0.08),
        limits={"the vma limit": 3},
    )  # fmt: skip
    yield Exercise(
        "munmap", TEXTS["munmap"], _ranged("munmap"),
        Recipe({"mmap": 9, "munmap": 8, "mprotect": 2, "write": 7, "read": 3, **several}, odd=0.08),
        frozenset({"unmap"}), {"the vma limit": 3},
    )  # fmt: skip
    yield Exercise(
        "mprotect", TEXTS["mprotect"], _ranged("mprotect", prot=True),
        Recipe({"mmap": 6, "munmap": 2, "mprotect": 12, "write": 7, "read": 3, **several}, odd=0.05),
        limits={"the vma limit": 3},
    )  # fmt: skip
    yield Exercise(
        "dontneed", TEXTS["dontneed"], _ranged("madvise"),
        Recipe({"mmap": 5, "munmap": 2, "madvise": 8, "write": 8, "read": 4, "mlock": 0.5, **several}, odd=0.05),
    )  # fmt: skip
    yield Exercise(
        "fork", TEXTS["fork"], _fork,
        Recipe({"mmap": 6, "munmap": 1, "mprotect": 2, "write": 7, "read": 3, "fork": 4, "exit": 4,
                "dontfork": 1, "wipeonfork": 1, "mlock": 1}),
    )  # fmt: skip


EXERCISES: dict[str, Exercise] = {e.name: e for e in _all()}
