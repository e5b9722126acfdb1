"""Every kept scenario: on this kernel and in the model, step by step; and in the model of every profile."""

from pathlib import Path

import pytest

from pagelens.model.profile import PROFILES
from pagelens.model.scenario import format_scenario, parse, parse_op
from pagelens.proof.probes import probe_profile
from pagelens.proof.verify import verify
from support.machine import HERE
from support.scenarios import wrong_in_the_model, wrong_on_this_kernel

SCENARIOS = sorted((Path(__file__).parent.parent / "model" / "scenarios").glob("*.plscn"))


@pytest.fixture(scope="module")
def profile():
    return probe_profile(machine=HERE).profile


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_on_this_kernel(path, profile):
    assert wrong_on_this_kernel(path, profile) == []


@pytest.mark.parametrize("name", [n for n in PROFILES if n.startswith("linux-")])
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_in_the_model_of_every_kernel(path, name):
    assert wrong_in_the_model(path, name) == []


def test_a_scenario_that_is_wrong_is_found(profile):
    text = "a = mmap 2 rw private anon\nwrite a[0]\nexpect faults 2\nexpect page a[1] present\n"
    verdict = verify(parse(text), profile, HERE)
    assert verdict.disagreements == []
    assert [u.where for u in verdict.unmet] == ["kernel", "model"] * 2
    assert not verdict.good
    assert str(verdict.unmet[0]) == "line 3: expect faults 2: the kernel has 1 faults"


def test_operations_written_out_read_back():
    for path in SCENARIOS:
        operations = parse(path.read_text()).operations
        assert parse(format_scenario(operations, "x")).operations == operations
        assert tuple(parse_op(str(op)) for op in operations) == operations
