"""Programs run on both sides: one given program (`verify`), or random ones until something differs (`fuzz`).

A long campaign is many programs of a few hundred operations, each in a fresh child: a failing one is short,
its seed alone repeats it, and the first disagreement ends it (after one, both sides have different states and
everything that follows would differ as well).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagelens.model.op import Op, Outcome
from pagelens.model.profile import Profile
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import format_scenario
from pagelens.proof.agreement import Agreement
from pagelens.proof.checkpoint import Disagreement
from pagelens.proof.children import ChildGoneError
from pagelens.proof.compare import Comparison
from pagelens.proof.fences import Fence
from pagelens.proof.machine import Machine
from pagelens.proof.mix import Mix
from pagelens.proof.oracle import Oracle
from pagelens.proof.randomprog import Generator
from pagelens.proof.reach import counted
from pagelens.proof.shrink import shrink
from pagelens.vm.errors import PagelensError
from pagelens.vm.units import HPAGE_SIZE

PROGRAM_LENGTH = 400
CHECKPOINT_EVERY = 100


@dataclass(slots=True)
class Result:
    """What a run found. failing: the (shrunk) program of the first disagreement. differing: each failing seed with its
    first disagreement. seed: that of the failing program, else of the first. used: how often each operation was done,
    and succeeded. reached: how often each rule of the profile mattered (proof.reach). unrepeated: seeds whose
    disagreement was gone when the same program ran again, twice: the kernel itself did two things on one program, so no
    rule of its own decides. interrupted: Ctrl-C came before all was done."""

    seed: int
    agreement: Agreement = field(default_factory=Agreement)
    disagreements: list[Disagreement] = field(default_factory=list)
    failing: list[Op] = field(default_factory=list)
    fences: tuple[Fence, ...] = ()
    used: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    programs: int = 0
    differing: list[tuple[int, Disagreement]] = field(default_factory=list)
    unrepeated: list[tuple[int, Disagreement]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def failed_seeds(self) -> list[int]:
        """The seeds of the programs that differ, and went on to when they ran again."""
        return [seed for seed, _ in self.differing]

    @property
    def scenario(self) -> str:
        """The failing program as text; empty if there is none."""
        if not self.failing:
            return ""
        what = str(self.disagreements[0]) if self.disagreements else ""
        return format_scenario(self.failing, f"seed {self.seed}: {what}")


Watch = Callable[[int, Op, Comparison], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """What a comparison is made with: the profile, the machine of the child, whether checkpoints are compared."""

    profile: Profile
    machine: Machine | None = None
    checkpoints: bool = True

    def run(self, program: Sequence[Op], result: Result, watch: Watch | None = None) -> list[Disagreement]:
        """One given program, to its first disagreement; counts go into `result`."""
        with Oracle(self.machine) as oracle:
            result.fences = oracle.fences
            comparison = self._comparison(oracle, result)
            try:
                for i, op in enumerate(program):
                    if found := _step(comparison, op):
                        return found
                    if watch is not None:
                        watch(i, op, comparison)
                    if found := self._checked(i + 1, op, comparison):
                        return found
                return comparison.checkpoint() if self.checkpoints else []
            finally:
                result.agreement.add(comparison.agreement)

    def fuzz_one(
        self, seed: int, length: int, mix: Mix, result: Result
    ) -> tuple[list[Op], list[Disagreement]]:
        """One random program, to its first disagreement: (the operations done, what differs)."""
        generator = Generator(seed, mix)
        program: list[Op] = []
        with Oracle(self.machine) as oracle:
            result.fences = oracle.fences
            comparison = self._comparison(oracle, result)
            try:
                while len(program) < length:
                    op = generator.next(oracle)
                    program.append(op)
                    found = _step(comparison, op)
                    _count(result.used, op, comparison.outcomes[0])
                    found = found or self._checked(len(program), op, comparison)
                    if found:
                        return program, found
                return program, comparison.checkpoint() if self.checkpoints else []
            finally:
                result.agreement.add(comparison.agreement)

    def _checked(self, done: int, op: Op, comparison: Comparison) -> list[Disagreement]:
        # What is compared only now and then, after operation `op`, the done-th.
        if not self.checkpoints:
            return []
        if done % CHECKPOINT_EVERY == 0:
            return comparison.checkpoint()
        return comparison.status() if _frees_tables(op) else []

    def _comparison(self, oracle: Oracle, result: Result) -> Comparison:
        model = ModelWorld(counted(self.profile, result.reached), oracle.setting)
        return Comparison(oracle, model, soft_dirty=self.profile.soft_dirty)

    def shrunk(self, program: Sequence[Op], kinds: frozenset[str]) -> tuple[list[Op], list[Disagreement]]:
        """The smallest program that still disagrees in one of `kinds`, and how it disagrees."""

        def fails(candidate: Sequence[Op]) -> bool:
            return any(d.kind in kinds for d in self.run(candidate, Result(0)))

        small = shrink(program, fails)
        return small, self.run(small, Result(0))


def _step(comparison: Comparison, op: Op) -> list[Disagreement]:
    try:
        return comparison.step(op)
    except ChildGoneError as exc:
        # Nothing that a program does ends a process without its asking.
        return [Disagreement("child", comparison.index, op, op.proc, "child", str(exc), "there")]


def _frees_tables(op: Op) -> bool:
    # A range that may free a whole page table: VmPTE is looked at before something else changes it.
    return op.length >= HPAGE_SIZE // 2 and op.name in ("madvise", "munmap", "mremap")


def _count(used: Counter[str], op: Op, outcome: Outcome | None) -> None:
    if outcome is None:
        return
    name = op.name
    used[name] += 1
    if not (outcome.signal or -4096 < outcome.result < 0):
        used[f"{name} ok"] += 1


def fuzz(
    bench: Bench,
    seed: int,
    operations: int,
    mix: Mix | None = None,
    *,
    go_on: bool = False,
    small: bool = True,
    progress: Callable[[Result], None] | None = None,
) -> Result:
    """Random programs, `operations` in all; program k has seed `seed` + k. Stops at the first disagreement,
    shrunk if `small`, unless `go_on` (then the first is kept and the seeds of all are listed), or at Ctrl-C."""
    result = Result(seed)
    mix = mix or Mix()
    try:
        while result.agreement.operations < operations:
            this = seed + result.programs
            length = min(PROGRAM_LENGTH, operations - result.agreement.operations)
            if _one(bench, this, length, mix, result, small) and not go_on:
                break
            if progress is not None:
                progress(result)
    except (KeyboardInterrupt, PagelensError) as exc:
        if not _by_hand(exc):
            raise
        result.interrupted = True
    return result


def _by_hand(exc: BaseException | None) -> bool:
    # A Ctrl-C that comes in the middle of something may make the clean-up fail as well, and is then behind that.
    while exc is not None and not isinstance(exc, KeyboardInterrupt):
        exc = exc.__context__
    return exc is not None


def _one(bench: Bench, seed: int, length: int, mix: Mix, result: Result, small: bool) -> bool:
    # One program into `result`; whether it differs, and goes on to.
    try:
        program, found = bench.fuzz_one(seed, length, mix, result)
    except PagelensError as exc:
        exc.args = (f"{exc} (seed {seed})",)
        raise
    result.programs += 1
    if not found:
        return False
    if not any(bench.run(program, Result(seed)) for _ in range(2)):
        result.unrepeated.append((seed, found[0]))
        return False
    result.differing.append((seed, found[0]))
    if not result.disagreements:
        result.seed, result.disagreements, result.failing = seed, found, program
        if small:
            kept, again = bench.shrunk(program, frozenset(d.kind for d in found))
            if again:
                result.failing, result.disagreements = kept, again
    return True
