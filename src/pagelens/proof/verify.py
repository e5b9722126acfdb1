"""A scenario on this kernel and in the model: every step compared, every expectation checked on both."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagelens.model.expect import applies, check, uncheckable
from pagelens.model.op import Op, Outcome
from pagelens.model.profile import Profile
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import Line, Scenario
from pagelens.proof.agreement import Agreement
from pagelens.proof.checkpoint import Disagreement
from pagelens.proof.compare import Comparison
from pagelens.proof.fences import Fence
from pagelens.proof.machine import Machine
from pagelens.proof.oracle import Oracle


@dataclass(frozen=True, slots=True)
class Unmet:
    """An expectation that does not hold. where: "kernel" or "model"; got: what is there instead."""

    line: Line
    where: str
    got: str

    def __str__(self) -> str:
        return f"line {self.line.number}: {self.line.text}: the {self.where} has {self.got}"


@dataclass(slots=True)
class Verdict:
    """What verifying found. checked, skipped: expectations (skipped: for other kernels, or not to be seen on
    this one)."""

    kernel: str = ""
    profile: str = ""
    agreement: Agreement = field(default_factory=Agreement)
    disagreements: list[Disagreement] = field(default_factory=list)
    unmet: list[Unmet] = field(default_factory=list)
    checked: int = 0
    skipped: list[Line] = field(default_factory=list)
    fences: tuple[Fence, ...] = ()

    @property
    def good(self) -> bool:
        """Nothing differs and every expectation that was checked holds."""
        return not self.disagreements and not self.unmet


def verify(scenario: Scenario, profile: Profile, machine: Machine | None = None) -> Verdict:
    """Run `scenario` on both sides. Goes on after a disagreement, so that all expectations are seen."""
    verdict = Verdict(profile=profile.name)
    soft_dirty = profile.soft_dirty
    with Oracle(machine) as oracle:
        verdict.fences, verdict.kernel = oracle.fences, str(oracle.machine.facts()["release"])
        model = ModelWorld(profile, oracle.setting)
        comparison = Comparison(oracle, model, soft_dirty=soft_dirty)
        outcomes: tuple[Outcome | None, Outcome | None] = (None, None)
        for line in scenario.lines:
            item = line.item
            if isinstance(item, Op):
                verdict.disagreements += comparison.step(item)
                outcomes = comparison.outcomes
                continue
            if not applies(line, profile.name) or uncheckable(item, soft_dirty=soft_dirty):
                verdict.skipped.append(line)
                continue
            verdict.checked += 1
            for where, world, outcome in (("kernel", oracle, outcomes[0]), ("model", model, outcomes[1])):
                got = check(item, world, outcome, soft_dirty=soft_dirty)
                if got is not None:
                    verdict.unmet.append(Unmet(line, where, got))
        verdict.disagreements += comparison.checkpoint()
        verdict.agreement = comparison.agreement
    return verdict
