"""`pagelens model grade`: a student's function against the reference and this kernel."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagelens.cli.output import emit_object, write_text
from pagelens.vm.errors import CapabilityMissingError, UsageError

if TYPE_CHECKING:
    from pagelens.lab.exercises import Exercise
    from pagelens.lab.grade import Grader


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments; output arguments are the caller's."""
    parser.add_argument("exercise", metavar="EXERCISE", nargs="?", help="which exercise (--list names them)")
    parser.add_argument("file", metavar="FILE", nargs="?", help="the Python file that defines its function")
    parser.add_argument("--list", action="store_true", help="the exercises, and the function of each")
    parser.add_argument("--template", action="store_true", help="print the file to start with")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random programs (default: a fresh one)")
    parser.add_argument(
        "--programs", type=int, metavar="N", help="random programs after the fixed ones (default: 40)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="CPU time that one call may take (default: 2)"
    )
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--kernel",
        metavar="P",
        help="grade by the model of this profile alone (default: this kernel as well)",
    )
    whose.add_argument(
        "--on", metavar="SOCKET", help="by the kernel of a virtual machine where `model serve` runs"
    )


def grade(args: argparse.Namespace) -> int:
    """Exit code 0: all right; 1: wrong."""
    from pagelens.lab.exercises import EXERCISES
    from pagelens.lab.grade import RANDOM_PROGRAMS

    if args.list:
        rows = [
            {"exercise": e.name, "function": f"{e.function}({e.text.parameters})", "title": e.text.title}
            for e in EXERCISES.values()
        ]
        text = "".join(f"  {r['exercise']:<11} {r['title']}\n              {r['function']}\n" for r in rows)
        emit_object(args, {"exercises": rows}, text)
        return 0
    if args.exercise is None:
        raise UsageError("grade needs an EXERCISE and a FILE; --list names the exercises")
    exercise = EXERCISES.get(args.exercise)
    if exercise is None:
        raise UsageError(f"no exercise {args.exercise!r}; there are: {', '.join(EXERCISES)}")
    if args.template:
        if args.file is not None:
            raise UsageError("--template takes no FILE; -o FILE writes it there")
        if args.format != "table":
            raise UsageError("--template prints a Python file; it has no other format")
        write_text(args, exercise.text.template())
        return 0
    if args.file is None:
        raise UsageError(f"grade {exercise.name} needs a FILE; --template prints one to start with")
    path = Path(args.file)
    if not path.is_file():
        raise UsageError(f"no file {args.file}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{args.file} cannot be read")
    programs = RANDOM_PROGRAMS if args.programs is None else args.programs
    if programs < 0:
        raise UsageError("--programs must be at least 0")
    if not 0.05 <= args.seconds <= 600:
        raise UsageError("--seconds must be from 0.05 to 600")
    if args.output and Path(args.output).exists() and not args.force:
        raise UsageError(f"{args.output} exists; --force overwrites it")
    with _grader(exercise, args) as grader:
        report = grader.grade(path, args.seed, programs)
    value = _as_dict(report, args.file)
    emit_object(args, value, _text(report, exercise.function))
    return 1 if report.failure else 0


@contextlib.contextmanager
def _grader(exercise: Exercise, args: argparse.Namespace) -> Iterator[Grader]:
    from pagelens.lab.grade import Grader
    from pagelens.model.profile import get_profile

    if args.kernel is not None:
        yield Grader(exercise, get_profile(args.kernel), seconds=args.seconds)
        return
    from pagelens.cli.model import machine_of, nearest_profile
    from pagelens.proof.machine import oracle_path
    from pagelens.proof.probes import probe_profile

    try:
        if args.on is None:
            oracle_path()
    except CapabilityMissingError as error:
        sys.stderr.write(f"pagelens: graded by the model alone: {error}\n")
        yield Grader(exercise, get_profile(nearest_profile(os.uname().release)), seconds=args.seconds)
        return
    with machine_of(args.on) as machine:
        yield Grader(exercise, probe_profile(machine=machine).profile, machine, seconds=args.seconds)


def _as_dict(report: Any, file: str) -> dict[str, Any]:
    failure = report.failure
    return {
        "exercise": report.exercise,
        "file": file,
        "right": failure is None,
        "kernel": report.kernel,
        "profile": report.profile,
        "seed": report.seed,
        "programs": report.programs,
        "operations": report.operations,
        "graded": report.graded,
        "disputed": report.disputed,
        "failure": failure
        and {
            "program": failure.program,
            "step": failure.step,
            "operation": failure.operation,
            "call": failure.call,
            "error": failure.broken or None,
            "expected_by": failure.who,
            "wrong": [{"subject": d.subject, "expected": d.expected, "got": d.got} for d in failure.wrong],
            "scenario": failure.scenario,
        },
        "notes": report.notes,
    }


def _text(report: Any, function: str) -> str:
    against = f"kernel {report.kernel} and " if report.kernel else ""
    lines = [f"{report.exercise}: against {against}the model {report.profile}, seed {report.seed}"]
    if report.failure:
        lines += [report.failure.text(), ""]
    lines.append(
        f"{'wrong' if report.failure else 'right'}: {report.graded:,} calls of {function} in"
        f" {report.programs} programs of {report.operations:,} operations"
    )
    if report.disputed:
        lines.append(
            f"{report.disputed} programs ended early: kernel and model did not agree there (not your mistake)"
        )
    return "\n".join(lines + [f"note: {note}" for note in report.notes])
