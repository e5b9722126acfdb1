"""The grader: a student's function against the reference, and the reference against this kernel.

Each program runs three times, an operation at a time: on the kernel (the oracle child of `proof`), in the
model, and - where the operation is what the exercise is about - in the student's function, which begins from
the model's state each time. The student is only told "the kernel did" where kernel and model did the same;
where they differ (a bug of ours) the program ends there, and the report counts it.

Rejected: letting the student's state run on from operation to operation (the first mistake would be reported
a hundred times); grading by final state only (it would not say which operation went wrong).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagelens.lab import wire
from pagelens.lab.exercises import Call, Exercise
from pagelens.lab.mini import MiniMm
from pagelens.lab.process import CPU_SECONDS, Broken, Student
from pagelens.lab.programs import Programs
from pagelens.lab.view import Difference, differences, missing_flush, place_text, view
from pagelens.model.op import Op, Outcome, errno_name
from pagelens.model.profile import Profile
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import format_scenario, parse
from pagelens.proof.compare import Comparison
from pagelens.proof.machine import Machine
from pagelens.proof.oracle import Oracle

RANDOM_PROGRAMS = 40
PROGRAM_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Failure:
    """The first operation that went wrong. program: its title; step: number of the operation in it, from 1.
    call: what was asked of the function. who: whom "expected" comes from. scenario: text to repeat it."""

    program: str
    step: int
    operation: str
    call: str
    who: str
    wrong: list[Difference]
    broken: str
    scenario: str

    def text(self) -> str:
        """Lines for the student."""
        lines = [f"wrong: operation {self.step} of {self.program}: {self.operation}", f"  asked: {self.call}"]
        if self.broken:
            lines.append(f"  your code: {self.broken}")
        for one in self.wrong[:3]:
            lines += [f"  {one.subject}:", f"    {self.who}: {one.expected}", f"    your code: {one.got}"]
        if len(self.wrong) > 3:
            lines.append(f"  and {len(self.wrong) - 3} more")
        lines += ["", "to repeat it (pagelens model step):", *(f"  {s}" for s in self.scenario.splitlines())]
        return "\n".join(lines)


@dataclass(slots=True)
class Report:
    """What grading found. operations: done; graded: calls of the student's function; disputed: programs that
    ended because kernel and model did not agree."""

    exercise: str
    seed: int
    profile: str
    kernel: str | None
    programs: int = 0
    operations: int = 0
    graded: int = 0
    disputed: int = 0
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)


class Grader:
    """Grades one exercise. machine: whose kernel's word counts; None: the model's alone. seconds: CPU time that one
    call may take."""

    def __init__(
        self,
        exercise: Exercise,
        profile: Profile,
        machine: Machine | None = None,
        *,
        seconds: float = CPU_SECONDS,
    ) -> None:
        self.seconds = seconds
        self.exercise = exercise
        self.profile = profile
        self.machine = machine
        facts = machine.facts() if machine is not None else {}
        self.kernel = str(facts["release"]) if facts else None
        self.levels = int(facts.get("levels", 4))

    def grade(self, path: Path, seed: int | None = None, programs: int = RANDOM_PROGRAMS) -> Report:
        """Run the fixed programs, then random ones, to the first failure. DamagedInputError where the file
        cannot be loaded."""
        seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        report = Report(self.exercise.name, seed, self.profile.name, self.kernel)
        with Student(path, self.exercise.function, self.seconds, self.levels) as student:
            for title, text in self.exercise.text.fixed:
                operations = parse(text, title).operations
                limit = self.exercise.limits.get(title)
                report.failure = self._play(student, report, f"{title!r}", iter(operations), limit)
                if report.failure:
                    break
            else:
                for k in range(programs):
                    made = Programs(f"{seed}.{k}", self.exercise.recipe)
                    name = f"random program {k + 1} of seed {seed}"
                    report.failure = self._play(student, report, name, made)
                    if report.failure:
                        break
            if student.printed:
                report.notes.append(
                    f"it printed {student.printed} lines (the first: {student.first!r}); only what it returns"
                    " and what it changes counts"
                )
        return report

    def _play(
        self,
        student: Student,
        report: Report,
        title: str,
        source: Programs | Iterator[Op],
        limit: int | None = None,
    ) -> Failure | None:
        report.programs += 1
        with ExitStack() as stack:
            # A program with a limit of its own is the model's: the kernel's is the whole system's.
            live = self.machine is not None and limit is None
            oracle = stack.enter_context(Oracle(self.machine)) if live else None
            world = ModelWorld(self.profile, oracle.setting if oracle else None)
            if limit is not None:
                world.machine.max_map_count = limit
            comparison = Comparison(oracle, world, soft_dirty=self.profile.soft_dirty) if oracle else None
            done: list[Op] = []
            for op in self._operations(source, world):
                done.append(op)
                report.operations += 1
                process = world.processes.get(op.proc)
                before = view(world, process) if process is not None else None
                calls = self.exercise.calls(world, op, before) if before is not None else []
                if comparison is not None:
                    if comparison.step(op):
                        report.disputed += 1
                        return None
                    outcome = comparison.outcomes[1]
                else:
                    outcome = world.apply(op)
                if before is None or outcome is None or process is None or not process.alive:
                    continue
                who = f"the kernel ({self.kernel})" if oracle else f"the model ({self.profile.name})"
                for call in calls:
                    report.graded += 1
                    wrong, broken = self._ask(student, world, call, before, outcome, view(world, process))
                    if wrong or broken:
                        text = format_scenario(done)
                        return Failure(title, len(done), str(op), call.text, who, wrong, broken, text)
        return None

    @staticmethod
    def _operations(source: Programs | Iterator[Op], world: ModelWorld) -> Iterator[Op]:
        if isinstance(source, Programs):
            for _ in range(PROGRAM_LENGTH):
                yield source.next(world)
        else:
            yield from source

    def _ask(
        self,
        student: Student,
        world: ModelWorld,
        call: Call,
        before: MiniMm,
        outcome: Outcome,
        after: MiniMm,
    ) -> tuple[list[Difference], str]:
        # ([what differs], "") or ([], how it did not answer).
        request = {
            "frames": wire.dump_frames(before.frames), "mm": wire.dump(before), "args": call.args,
            "withheld": sorted(self.exercise.withheld),
        }  # fmt: skip
        try:
            reply = student.call(request)
        except Broken as broken:
            return [], str(broken)
        right, heap = call.answer(outcome, after), after.start_brk
        result = reply["result"]
        if type(result) is not type(right) or result != right:
            texts = _answer_text(right, heap), _answer_text(result, heap)
            if isinstance(result, int) and isinstance(right, int) and type(result) is not type(right):
                texts = f"{texts[0]} ({type(right).__name__})", f"{texts[1]} ({type(result).__name__})"
            return [Difference("the answer", *texts)], ""
        if call.most is not None and reply["looked"] > call.most:
            n = len(before.vmas)
            got = f"{reply['looked']} of {n} looked at"
            return [Difference("the cost", f"at most {call.most} of {n} vmas looked at", got)], ""
        if not call.state:
            return [], ""
        frames = wire.load_frames(reply["frames"])
        got_mm = wire.load(reply["mm"], frames)
        wrong = differences(before, after, got_mm)
        flush = None if wrong else missing_flush(before, got_mm, heap)
        wrong += [flush] if flush else []
        if call.child and not wrong:
            theirs = view(world, world.processes[call.child])
            child = wire.load(reply["child"], frames)
            wrong = [
                Difference(f"the child: {d.subject}", d.expected, d.got)
                for d in differences(before, theirs, child)
            ]
            wrong += _fork_links(theirs, child)
        return wrong, ""


def _fork_links(expected: MiniMm, got: MiniMm) -> list[Difference]:
    # Whether later merges and copies will know that these vmas come from a fork.
    out = []
    for a, b in zip(expected.vmas, got.vmas, strict=False):
        if bool(a.anon_vma) and a.fork_child != b.fork_child:
            where = f"the child: vma at {place_text(a.start, expected.start_brk)}"
            out.append(Difference(where, f"fork_child is {a.fork_child}", f"fork_child is {b.fork_child}"))
    return out


def _answer_text(value: Any, heap: int) -> str:
    if isinstance(value, dict):
        vma = wire.load_vma(value["vma"])
        return f"the vma {place_text(vma.start, heap)}-{place_text(vma.end, heap)}"
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if -4096 < value < 0:
        return f"-{errno_name(value)}"
    return place_text(value, heap) if value > 4096 else str(value)
