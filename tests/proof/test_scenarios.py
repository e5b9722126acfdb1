"""Every kept scenario: on this kernel and in the model, step by step; and in the model of every profile."""

import os
from pathlib import Path

import pytest

from pagelens.model.expect import applies, check
from pagelens.model.op import Op
from pagelens.model.profile import PROFILES
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import format_scenario, parse, parse_op
from pagelens.proof.probes import probe_profile
from pagelens.proof.verify import verify

CPU = max(os.sched_getaffinity(0))
SCENARIOS = sorted((Path(__file__).parent.parent / "model" / "scenarios").glob("*.plscn"))


@pytest.fixture(scope="module")
def profile():
    return probe_profile(cpu=CPU).profile


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_on_this_kernel(path, profile):
    verdict = verify(parse(path.read_text(), path.name), profile, CPU)
    assert [str(d) for d in verdict.disagreements] == []
    assert [str(u) for u in verdict.unmet] == []
    assert verdict.checked + len(verdict.skipped) == sum(
        not isinstance(line.item, Op) for line in parse(path.read_text()).lines
    )


@pytest.mark.parametrize("name", [n for n in PROFILES if n.startswith("linux-")])
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_in_the_model_of_every_kernel(path, name):
    world, outcome = ModelWorld(name), None
    for line in parse(path.read_text(), path.name).lines:
        if isinstance(line.item, Op):
            outcome = world.apply(line.item)
        elif applies(line, name):
            got = check(line.item, world, outcome, soft_dirty=world.machine.profile.soft_dirty)
            assert got is None, f"line {line.number}: {line.text}: {got}"


def test_a_scenario_that_is_wrong_is_found(profile):
    text = "a = mmap 2 rw private anon\nwrite a[0]\nexpect faults 2\nexpect page a[1] present\n"
    verdict = verify(parse(text), profile, CPU)
    assert verdict.disagreements == []
    assert [u.where for u in verdict.unmet] == ["kernel", "model"] * 2
    assert not verdict.good
    assert str(verdict.unmet[0]) == "line 3: expect faults 2: the kernel has 1 faults"


def test_operations_written_out_read_back():
    for path in SCENARIOS:
        operations = parse(path.read_text()).operations
        assert parse(format_scenario(operations, "x")).operations == operations
        assert tuple(parse_op(str(op)) for op in operations) == operations
