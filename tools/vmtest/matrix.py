"""`./dev test-kernels`: the same tests on each kernel, all guests at a time.

A guest's tests wait for one another, so it keeps about one CPU busy: three guests leave two CPUs no idle time,
where two would leave the third a run of its own. Each guest runs tests/kernels and tests/live with pytest; its
lines are shown as they come, each behind its kernel's name. A guest that fails itself (panic, hang, memory,
time) counts as one failure more, with its console.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmtest import fetch, qemu, skips
from vmtest.rootfs import root_image
from vmtest.verdict import Verdict

TESTS = ("tests/kernels", "tests/live")
# Those whose processor has five levels of page tables, as servers have; the others have four.
FIVE_LEVELS = frozenset({fetch.DEFAULT[-1]})


@dataclass
class Plan:
    """What to run. `budget`: seconds after which a guest starts no further test."""

    root: Path
    kernels: list[str]
    tests: list[str]
    marks: str = "not slow"
    jobs: int = 3
    budget: float = 1200.0
    memory: int = 3072
    environment: dict[str, str] = field(default_factory=dict)
    results: Path | None = None
    measure: bool = False
    all_tests: bool = False


@dataclass
class Outcome:
    """One guest's tests: counts, the lines that say what failed, and the results that it left."""

    kernel: str
    release: str
    verdict: Verdict
    counts: Counter[str]
    complaints: list[str]
    tests: list[dict[str, Any]]


class _Lines:
    # Whole lines only, so that two guests' output does not mix within a line.
    def __init__(self, name: str, lock: threading.Lock) -> None:
        self._name = name
        self._lock = lock
        self._rest = b""

    def write(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        with self._lock:
            for line in lines:
                print(f"{self._name:>5} | {line.decode(errors='replace').rstrip()}")
            sys.stdout.flush()

    def flush(self) -> None:
        if self._rest:
            self.write(b"\n")


def run(plan: Plan) -> list[Outcome]:
    """Runs the plan; returns one outcome for each kernel, in order."""
    kernels = [fetch.kernel(name) for name in plan.kernels]
    root_image()  # before the guests start: it may take a while
    _compile_tests(plan)
    lock = threading.Lock()
    allowed = skips.load(plan.root / "tests/kernels/allowed_skips.toml")
    with concurrent.futures.ThreadPoolExecutor(max(1, plan.jobs)) as pool:
        jobs = [pool.submit(_one, plan, kernel, allowed, lock) for kernel in kernels]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            qemu.stop.set()
            for job in jobs:
                job.cancel()
            raise


def _compile_tests(plan: Plan) -> None:
    # pytest rewrites and compiles each test file on its first import: a minute in each guest, so it is done here.
    # Whether it succeeds is for the guests to say. $PYTHONDONTWRITEBYTECODE, set in many containers, forbids it.
    elsewhere = {"PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *_tests(plan)],
        cwd=plan.root,
        env={name: value for name, value in os.environ.items() if name not in elsewhere},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def _tests(plan: Plan) -> list[str]:
    return [t for t in plan.tests if (plan.root / t.partition("::")[0]).exists()]


def _one(plan: Plan, kernel: fetch.Kernel, allowed: list[skips.Allowed], lock: threading.Lock) -> Outcome:
    command = ["python", "-m", "pytest", "-p", "vmtest.plugin", "-p", "no:cacheprovider", "-v", "--tb=short"]
    command += ["-o", "timeout=300", "-o", "console_output_style=classic", "-m", plan.marks, *_tests(plan)]
    machine = qemu.Machine(
        kernel,
        command,
        plan.root,
        environment={
            "PYTHONPATH": str(plan.root / "tools"),
            "VMTEST_BUDGET": str(plan.budget),
            "VMTEST_KERNEL": kernel.name,
            **({} if plan.all_tests else {"VMTEST_LEFT_OUT": str(plan.root / "tests/kernels/left_out.toml")}),
            "COLUMNS": "100",
            **({"PAGELENS_MEASURE_ONLY": "1"} if plan.measure else {}),
            **plan.environment,
        },
        memory=plan.memory,
        five_levels=kernel.name in FIVE_LEVELS,
        # A single test may run over the budget by its own limit; a hang is noticed much earlier.
        limit=plan.budget + 300,
    )
    results = (plan.results or plan.root / "build/vmtest") / kernel.name
    shutil.rmtree(results, ignore_errors=True)
    lines = _Lines(kernel.name, lock)
    verdict = qemu.run(machine, lines.write, lines.write, results)
    lines.flush()
    return judge(kernel, verdict, results, allowed)


def judge(kernel: fetch.Kernel, verdict: Verdict, results: Path, allowed: list[skips.Allowed]) -> Outcome:
    """Counts what a guest reported, against the allowed skips."""
    file = results / "tests.jsonl"
    tests = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    counts: Counter[str] = Counter()
    complaints = []
    for test in tests:
        outcome = test["outcome"]
        if outcome == "skipped" and not any(a.covers(kernel, test["test"], test["why"]) for a in allowed):
            complaints.append(
                f"{test['test']}: skipped, and allowed_skips.toml does not list it: {test['why']}"
            )
            outcome = "failed"
        elif outcome == "not run":
            complaints.append(f"{test['test']}: not run ({test['why']})")
            outcome = "failed"
        elif outcome == "failed":
            complaints.append(f"{test['test']}: failed")
        counts[outcome] += 1
    # pytest ends with 0, 1 (some failed) or 5 (none selected); anything else means that it did not finish.
    if not verdict.good:
        complaints.append(verdict.report())
        counts["failed"] += 1
    elif verdict.code not in (0, 1) or not tests:
        complaints.append(f"pytest ended with code {verdict.code} after {len(tests)} tests")
        counts["failed"] += 1
    elif verdict.code == 1 and not counts["failed"]:
        complaints.append("pytest reports a failure that no test's record shows")
        counts["failed"] += 1
    return Outcome(kernel.name, kernel.release, verdict, counts, complaints, tests)


def record(outcomes: list[Outcome], plan: Plan) -> None:
    """Puts what was measured beside the documentation, and makes docs/kernels.md of it.

    Of the kernels that have a name (a version): unless a value is not what tests/kernels/expected.toml says (with
    `measure` nothing is compared), or one that was there before was not measured. What is not recorded is said.
    """
    places = plan.root / "docs/kernels"
    places.mkdir(exist_ok=True)
    for outcome in outcomes:
        file = (plan.results or plan.root / "build/vmtest") / outcome.kernel / "facts.json"
        place = places / f"{outcome.kernel}.json"
        found = _facts(file)
        # The words of support/facts.py.
        wrong = [
            t["test"] for t in outcome.tests if re.search(r": measured .*, expected .* on kernel", t["why"])
        ]
        lost = _facts(place).keys() - found.keys()
        if not re.fullmatch(r"\d+\.\d+", outcome.kernel):
            why = "a kernel of one's own has no column"
        elif not outcome.verdict.good:
            why = outcome.verdict.end.value
        elif wrong:
            why = f"not as expected: {', '.join(wrong)}"
        elif lost or not found:
            why = f"not measured this time: {', '.join(sorted(lost))}"
        else:
            shutil.copyfile(file, place)
            continue
        print(f"{outcome.kernel}: not recorded: {why}")
    subprocess.run([sys.executable, str(plan.root / "tools/kernels_table.py")], check=True)


def _facts(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())["facts"]) if file.exists() else {}


def summary(outcomes: list[Outcome], began: float) -> int:
    """Prints what failed, each guest's times and the closing line; returns the exit code."""
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total += outcome.counts
        boot = outcome.verdict.boot_s
        c = outcome.counts
        print(
            f"{outcome.kernel} ({outcome.release}): {c['passed']} passed, {c['failed']} failed, "
            f"{c['skipped']} skipped; ready after {f'{boot:.1f} s' if boot else 'never'}, "
            f"{outcome.verdict.total_s:.0f} s in all"
        )
        for complaint in outcome.complaints:
            print(f"  {outcome.kernel}: {complaint}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"kernels: {len(outcomes)} guests in {time.monotonic() - began:.0f} s "
        f"({used.ru_utime + used.ru_stime:.0f} s of CPU time)"
    )
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] or not total["passed"] else 0
