"""A scenario file on this kernel, and in the model of any: what does not hold, as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagelens.model.expect import applies, check
from pagelens.model.op import Op
from pagelens.model.profile import Profile
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import parse
from pagelens.proof.verify import verify
from pagelens.vm.errors import CapabilityMissingError
from support.machine import HERE


def wrong_on_this_kernel(path: Path, profile: Profile) -> list[str]:
    """Where kernel and model disagree, and expectations that either does not meet. Every one has been looked at."""
    scenario = parse(path.read_text(), path.name)
    try:
        verdict = verify(scenario, profile, HERE)
    except CapabilityMissingError as missing:
        pytest.skip(f"missing capability: {missing.capability} ({missing})")
    assert verdict.checked + len(verdict.skipped) == sum(not isinstance(n.item, Op) for n in scenario.lines)
    return [str(one) for one in (*verdict.disagreements, *verdict.unmet)]


def wrong_in_the_model(path: Path, name: str) -> list[str]:
    """Expectations that the model of profile `name` does not meet."""
    wrong = []
    world, outcome = ModelWorld(name), None
    for line in parse(path.read_text(), path.name).lines:
        if isinstance(line.item, Op):
            outcome = world.apply(line.item)
        elif applies(line, name):
            got = check(line.item, world, outcome, soft_dirty=world.machine.profile.soft_dirty)
            if got is not None:
                wrong.append(f"{path.name}, line {line.number}: {line.text}: {got}")
    return wrong
