"""Every rule of the profile makes a difference somewhere: a program on which the model with the rule and the
model without it part. No kernel is needed, so this also holds for rules that the running kernel cannot show."""

import pytest

from pagelens.model import Machine
from pagelens.model import op as ops
from pagelens.model.profile import PROFILES, Profile
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import parse
from pagelens.model.world import Setting
from pagelens.proof.compare import Comparison
from pagelens.proof.probes import NOT_PROBED, PROBES
from pagelens.vm.units import HPAGE_SIZE, PAGE_SIZE

BASE = PROFILES["linux-6.18"]  # has soft-dirty, guard pages and all else that a rule may need


def differences(text, profile, other, setting=None):
    """What differs between two models that do the same."""
    here, there = ModelWorld(profile, setting), ModelWorld(other, setting)
    comparison = Comparison(here, there, soft_dirty=True)
    found = [d for op in parse(text).operations for d in comparison.step(op)]
    return found + comparison.checkpoint()


def inverted(rule, profile=BASE):
    return profile.with_rules(**{rule: not getattr(profile, rule)})


@pytest.mark.parametrize("rule", sorted(PROBES))
def test_a_probe_shows_its_rule(rule):
    assert differences(PROBES[rule], BASE, inverted(rule)) != []
    assert differences(PROBES[rule], BASE, BASE) == []


def test_soft_dirty():
    text = "mmap 1 at arena[0] rw private anon fixed\nclear_refs 4\nwrite arena[0]"
    assert differences(text, BASE, inverted("soft_dirty")) != []


def test_status_without_rss():
    worlds = [ModelWorld(p, Setting()) for p in (BASE, inverted("status_rss_lags"))]
    assert [w.setting.rss_exact for w in worlds] == [True, False]  # what proof.checkpoint compares by


def test_a_file_without_a_method_of_its_own():
    """6.12 aligns it to 2 MiB, 6.18 does not."""
    places = []
    for profile in (BASE, inverted("thp_align_file_test")):
        machine = Machine(profile)
        process = machine.spawn()
        process.mmap(0, PAGE_SIZE, 3, ops.PRIVATE | ops.ANONYMOUS)
        file = machine.file("/on/overlay", HPAGE_SIZE)
        places.append(process.mmap(0, HPAGE_SIZE, 1, ops.PRIVATE, file) % HPAGE_SIZE == 0)
    assert places == [False, True]


def test_the_vma_limit_of_mremap():
    """map_count + 4 > limit refuses a move in 7.2, map_count + 2 >= limit - 3 before."""
    limit = 40
    setting = Setting(max_map_count=limit)
    text = "".join(
        f"mmap 1 at arena[{i}] {'r' if i % 2 else 'rw'} private anon fixed\n" for i in range(limit - 5 - 2)
    )
    text += "mremap arena[0] 1 maymove fixed to arena[200]\n"
    found = differences(text, BASE, inverted("mremap_counts_exactly"), setting)
    assert {d.kind for d in found} >= {"results", "vmas"}


def test_every_rule_is_shown():
    """A new rule needs a probe, or a test above and a line in NOT_PROBED."""
    assert set(PROBES) | NOT_PROBED == set(Profile.rules())
    assert {"soft_dirty", "status_rss_lags", "thp_align_file_test", "mremap_counts_exactly"} == NOT_PROBED
