"""`pagelens model`."""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagelens.cli.output import emit_object, write_file
from pagelens.vm.errors import DamagedInputError, UsageError
from pagelens.vm.units import counted

if TYPE_CHECKING:
    from pagelens.model.runner import ModelWorld
    from pagelens.model.scenario import Scenario
    from pagelens.proof.campaign import Bench, Result
    from pagelens.proof.machine import Machine

SHOWS = ("maps", "smaps", "pagemap", "tables", "events")


class Command:
    """The executable model of Linux paging: run it, step through it, prove it against this kernel.

    run     a scenario in the model, for any kernel profile; its expectations are checked
    step    one operation at a time, each fault in stages: error code, vma, permission, walk, frame, change
    verify  a scenario on this kernel and in the model, compared after each step
    fuzz    random programs on both, until they disagree; a disagreement is shrunk to a scenario
    grade   an exercise of the paging lab (docs/lab): your fault handler, mmap, munmap against both
    serve   in a virtual machine: its kernel is what `verify --on` and `fuzz --on` compare with, run here

    No privilege is needed. The kernel side runs in a child of our own that is fenced from huge pages, KSM,
    NUMA balancing and randomised addresses; nothing on the system is changed.

      $ pagelens model run cow.plscn --kernel linux-6.1 --show maps
      $ echo 'write arena[0]' | pagelens model step
      $ pagelens model verify cow.plscn
      $ pagelens model fuzz --seed 1 --ops 20000
      $ pagelens model fuzz --on vm.sock       # there: pagelens model serve /dev/vport0p1
      $ pagelens model grade fault --template -o fault.py; pagelens model grade fault fault.py

    The scenario language is in docs/scenarios.md. Exit code 1: an expectation failed, model and kernel
    disagree, or a graded solution is wrong.
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Subcommands."""
        subs = parser.add_subparsers(dest="what", required=True, metavar="run|step|verify|fuzz|grade|serve")
        run = subs.add_parser("run", help="a scenario in the model", allow_abbrev=False)
        run.add_argument("scenario", metavar="SCENARIO", help="a file in the scenario language; - for stdin")
        _kernel(run)
        run.add_argument(
            "--show",
            action="append",
            choices=SHOWS,
            default=[],
            help="also print this of every process at the end",
        )
        _output(run)
        step = subs.add_parser("step", help="one operation at a time", allow_abbrev=False)
        step.add_argument("scenario", metavar="SCENARIO", nargs="?", help="start with these operations")
        _kernel(step)
        verify = subs.add_parser(
            "verify", help="a scenario on this kernel and in the model", allow_abbrev=False
        )
        verify.add_argument(
            "scenario", metavar="SCENARIO", help="a file in the scenario language; - for stdin"
        )
        verify.add_argument(
            "--profile", metavar="P", help="compare with this profile (default: found by probing)"
        )
        _on(verify)
        _output(verify)
        fuzz = subs.add_parser("fuzz", help="random programs on both", allow_abbrev=False)
        fuzz.add_argument("--seed", type=int, metavar="N", help="first seed (default: a fresh one, printed)")
        fuzz.add_argument(
            "--ops", type=int, default=20_000, metavar="N", help="operations in all (default: 20000)"
        )
        fuzz.add_argument(
            "--processes", type=int, default=3, metavar="P", help="at most so many at once (default: 3)"
        )
        fuzz.add_argument(
            "--profile", metavar="P", help="compare with this profile (default: found by probing)"
        )
        fuzz.add_argument(
            "--go-on", action="store_true", help="do not stop at the first disagreement; list all seeds"
        )
        fuzz.add_argument("--no-shrink", action="store_true", help="keep the failing program as it was")
        fuzz.add_argument("--save", metavar="FILE", help="write the failing scenario to FILE as well")
        _on(fuzz)
        _output(fuzz)
        served = subs.add_parser("serve", help="be the machine that --on speaks of", allow_abbrev=False)
        served.add_argument(
            "port", metavar="PORT", help="a virtio-serial port, a serial line or a pseudo-terminal, raw"
        )
        from pagelens.cli.model_grade import configure

        grade = subs.add_parser("grade", help="an exercise of the paging lab", allow_abbrev=False)
        configure(grade)
        _output(grade)

    def run(self, args: argparse.Namespace) -> int:
        """Dispatch."""
        match args.what:
            case "run":
                return _run(args)
            case "step":
                from pagelens.cli.model_step import step

                return step(_world(args), _load(args.scenario) if args.scenario else None)
            case "verify":
                return _verify(args)
            case "grade":
                from pagelens.cli.model_grade import grade

                return grade(args)
            case "serve":
                from pagelens.proof.distant import serve

                serve(args.port)
                return 0
            case _:
                return _fuzz(args)


def _kernel(parser: argparse.ArgumentParser) -> None:
    text = "which kernel to be (default: the profile nearest to this kernel)"
    parser.add_argument("--kernel", metavar="P", help=text)
    parser.add_argument(
        "--levels", type=int, choices=(4, 5), default=4, help="of page tables (default: 4; 5 as with la57)"
    )


def _on(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on",
        metavar="SOCKET",
        help="the kernel of a virtual machine where `model serve` runs (default: this kernel)",
    )


def _output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format", choices=("table", "json"), default="table", help="how to print (default: table)"
    )
    group.add_argument("-o", "--output", metavar="FILE", help="write to FILE instead of standard output")
    group.add_argument("--force", action="store_true", help="overwrite FILE")


def _load(name: str) -> Scenario:
    from pagelens.model.scenario import parse

    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except FileNotFoundError:
        raise UsageError(f"no scenario {name}") from None
    except UnicodeDecodeError:
        raise DamagedInputError(f"{name} is not text") from None
    return parse(text, "stdin" if name == "-" else name)


def nearest_profile(release: str) -> str:
    """The Linux profile nearest to a kernel release: the newest that is not newer, else the oldest."""
    from pagelens.model.profile import PROFILES

    known = sorted(tuple(map(int, n[6:].split("."))) for n in PROFILES if n.startswith("linux-"))
    match = re.match(r"(\d+)\.(\d+)", release)
    here = (int(match[1]), int(match[2])) if match else known[-1]
    best = max((k for k in known if k <= here), default=known[0])
    return f"linux-{best[0]}.{best[1]}"


def _world(args: argparse.Namespace) -> ModelWorld:
    from pagelens.model.runner import ModelWorld
    from pagelens.model.world import Setting

    setting = Setting(text_pages=0, region_pages=0, levels=args.levels)
    return ModelWorld(args.kernel or nearest_profile(platform.release()), setting)


def _run(args: argparse.Namespace) -> int:
    from pagelens.cli.model_show import show
    from pagelens.model.expect import applies, check
    from pagelens.model.op import Op, Outcome

    scenario = _load(args.scenario)
    world = _world(args)
    profile = world.machine.profile
    lines: list[str] = [f"model {profile.name}: {scenario.title or scenario.name}"]
    steps: list[dict[str, Any]] = []
    failed = 0
    outcome: Outcome | None = None
    for line in scenario.lines:
        item = line.item
        if isinstance(item, Op):
            obstacle = world.obstacle(item)
            outcome = world.apply(item)
            said = outcome.text(item) if outcome else f"left out: {obstacle}"
            lines.append(f"{line.number:4d}  {line.text:<50} {said}")
            steps.append(_step_row(line.number, line.text, outcome))
            continue
        if not applies(line, profile.name):
            continue
        got = check(item, world, outcome, soft_dirty=profile.soft_dirty)
        failed += got is not None
        lines.append(f"{line.number:4d}  {line.text:<50} {'ok' if got is None else 'NO: ' + got}")
        steps.append({"line": line.number, "text": line.text, "ok": got is None, "got": got})
    shown = {what: show(world, what) for what in args.show}
    for what, text in shown.items():
        lines += ["", f"-- {what}", text]
    value = {
        "scenario": scenario.name, "profile": profile.name, "failed": failed, "steps": steps, "show": shown
    }  # fmt: skip
    emit_object(args, value, "\n".join(lines))
    return 1 if failed else 0


def _step_row(number: int, text: str, outcome: Any) -> dict[str, Any]:
    if outcome is None:
        return {"line": number, "text": text, "result": None}
    from pagelens.model.op import SIGNAL_NAMES

    return {
        "line": number,
        "text": text,
        "result": outcome.result,
        "faults": outcome.faults,
        "signal": SIGNAL_NAMES.get(outcome.signal) if outcome.signal else None,
        "si_code": outcome.code if outcome.signal else None,
        "addr": f"{outcome.addr:#x}" if outcome.signal else None,
    }


@contextlib.contextmanager
def machine_of(on: str | None) -> Iterator[Machine]:
    """The machine behind the socket `on`; None: this one, children pinned to the last CPU that we may use."""
    import os

    from pagelens.proof.distant import connected
    from pagelens.proof.machine import Local

    if on is None:
        yield Local(max(os.sched_getaffinity(0)))
        return
    with connected(on) as machine:
        yield machine


def _bench(profile: str | None, machine: Machine) -> tuple[Bench, str]:
    from pagelens.proof.campaign import Bench
    from pagelens.proof.probes import probe_profile

    probed = probe_profile(profile, machine)
    if probed.unsettled:
        sys.stderr.write(
            f"pagelens: neither value of {', '.join(probed.unsettled)} explains this kernel;"
            " using the profile's\n"
        )
    return Bench(probed.profile, machine), probed.text


def _verify(args: argparse.Namespace) -> int:
    from pagelens.proof.verify import verify

    scenario = _load(args.scenario)
    with machine_of(args.on) as machine:
        bench, how = _bench(args.profile, machine)
        verdict = verify(scenario, bench.profile, machine)
    lines = [f"kernel {verdict.kernel} against model {how}: {scenario.title or scenario.name}"]
    lines += [f"disagree: {d}" for d in verdict.disagreements]
    lines += [f"expected: {u}" for u in verdict.unmet]
    lines += [f"fence {f.name} is open: {f.how}" for f in verdict.fences if not f.ok]
    skipped = f", {len(verdict.skipped)} not for this kernel" if verdict.skipped else ""
    lines += [
        f"{verdict.agreement.operations} operations, {counted(len(verdict.disagreements), 'disagreement')};"
        f" {verdict.checked} expectations checked on both{skipped}, {len(verdict.unmet)} not met",
        verdict.agreement.text(),
    ]
    value = {
        "kernel": verdict.kernel,
        "profile": verdict.profile,
        "seed": None,
        "operations": verdict.agreement.operations,
        "disagreements": len(verdict.disagreements) + len(verdict.unmet),
        "scenario": scenario.name,
    }
    emit_object(args, value, "\n".join(lines))
    return 0 if verdict.good else 1


def _fuzz(args: argparse.Namespace) -> int:
    from pagelens.proof.campaign import fuzz
    from pagelens.proof.mix import Mix
    from pagelens.proof.probes import left_out
    from pagelens.proof.reach import RULES

    if args.ops < 1 or args.processes < 1:
        raise UsageError("--ops and --processes must be at least 1")
    if args.processes > 14:
        raise UsageError("--processes is at most 14")
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    with machine_of(args.on) as machine:
        release = str(machine.facts()["release"])
        bench, how = _bench(args.profile, machine)
        without = left_out(machine)
        result = fuzz(
            bench, seed, args.ops, Mix(args.processes, without), go_on=args.go_on, small=not args.no_shrink,
            progress=_progress(args.ops),
        )  # fmt: skip
    if args.save and result.failing:
        write_file(Path(args.save), result.scenario.encode(), args.force)
    value = {
        "kernel": release,
        "profile": bench.profile.name,
        "seed": result.seed if result.failing else seed,
        "operations": result.agreement.operations,
        "disagreements": len(result.failed_seeds),
        "differences": [f"seed {s}: {d}" for s, d in result.differing],
        "open_fences": [f"{f.name}: {f.how}" for f in result.fences if not f.ok],
        "scenario": result.scenario or None,
        "interrupted": result.interrupted,
        "unrepeated": len(result.unrepeated),
        "succeeded": result.agreement.succeeded,
        "reached": {rule: result.reached[rule] for rule in RULES},
    }
    emit_object(args, value, _fuzz_text(result, seed, release, how))
    if result.interrupted:
        return 130
    return 1 if result.failed_seeds else 0


def _fuzz_text(result: Result, seed: int, release: str, how: str) -> str:
    from pagelens.proof.mix import GENERATOR
    from pagelens.proof.reach import RULES

    reached = sorted(RULES, key=lambda rule: result.reached[rule])
    done = result.agreement
    lines = [
        f"kernel {release} against model {how}, seed {seed} of generator {GENERATOR}:"
        f" {done.operations:,} operations in {result.programs:,} programs,"
        f" {100 * done.succeeded // max(done.operations, 1)} % succeeded,"
        f" {counted(len(result.failed_seeds), 'disagreement')}{'; interrupted' if result.interrupted else ''}",
        done.text(),
        "rules reached: " + ", ".join(f"{rule} {result.reached[rule]:,}" for rule in reached),
    ]
    lines += [f"gone when the program ran again: seed {s}: {d}" for s, d in result.unrepeated]
    lines += [f"fence {f.name} is open: {f.how}" for f in result.fences if not f.ok]
    if result.failing:
        lines += ["", *(str(d) for d in result.disagreements[:10]), "", result.scenario.rstrip()]
    if len(result.failed_seeds) > 1:
        lines += ["", "failing seeds: " + " ".join(map(str, result.failed_seeds))]
    return "\n".join(lines)


def _progress(total: int) -> Any:
    # On stderr: what differs, as it is found, and how far it is; where a person looks at it, in one line.
    person = sys.stderr.isatty()
    shown = 0
    every = 5000
    due = every

    def show(result: Result) -> None:
        nonlocal shown, due
        done = result.agreement.operations
        for seed, disagreement in result.differing[shown:]:
            sys.stderr.write(f"{chr(13) if person else ''}seed {seed}: {disagreement}\n")
        shown = len(result.differing)
        count = f"{done:,} of {total:,} operations, {shown} disagreements"
        if person:
            sys.stderr.write(f"\r{count}" + ("\n" if done >= total else ""))
        elif done >= due:
            due = done // every * every + every
            sys.stderr.write(f"{count}\n")
        sys.stderr.flush()

    return show
