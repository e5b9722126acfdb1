"""The model against the kernel of the guest: random programs with a fresh seed, and the rules that only some of
these kernels, or only a lowered limit, can show."""

from __future__ import annotations

import os
import platform
import random
from pathlib import Path

import pytest

from pagelens.cli.model import nearest_profile
from pagelens.model.scenario import parse
from pagelens.proof.campaign import Bench, fuzz
from pagelens.proof.mix import GENERATOR, Mix
from pagelens.proof.probes import (
    Probed,
    disagreements,
    has_protection_keys,
    probe_profile,
    probe_program,
)
from support.system import setting

CPU = max(os.sched_getaffinity(0))
LIMIT = "/proc/sys/vm/max_map_count"


@pytest.fixture(scope="module")
def probed() -> Probed:
    # The profile of this version, not the one that agrees best: trying them all takes a guest a minute.
    return probe_profile(nearest_profile(platform.release()), CPU)


def test_random_programs_agree(probed: Probed, guest: None, capsys: pytest.CaptureFixture[str]) -> None:
    """400 operations; the long runs are in docs/fidelity.md."""
    seed = random.SystemRandom().randrange(1 << 32)
    with capsys.disabled():
        print(f"\nfuzz: seed {seed} of generator {GENERATOR}, {probed.text}")
    without = frozenset({"exec_only"} if has_protection_keys(CPU) else ())
    result = fuzz(Bench(probed.profile, CPU), seed, 400, Mix(without=without))
    assert result.scenario == "", f"seed {seed}"
    assert result.agreement.succeeded >= 0.6 * result.agreement.operations


def test_sticky_soft_dirty(probed: Probed) -> None:
    if not probed.profile.soft_dirty:
        pytest.skip("missing capability: soft-dirty")
    profile = probed.profile
    other = profile.with_rules(sticky_softdirty=not profile.sticky_softdirty)
    program = probe_program("sticky_softdirty")
    assert disagreements(program, profile, CPU) == []
    assert disagreements(program, other, CPU) != []


@pytest.mark.parametrize("left", [3, 4, 5, 6])
def test_the_vma_limit_of_mremap(probed: Probed, left: int) -> None:
    """A move with so few vmas left below the limit, which is lowered to little more than this process needs."""
    limit = len(Path("/proc/self/maps").read_text().splitlines()) + 100
    text = "".join(
        f"mmap 1 at arena[{i}] {'r' if i % 2 else 'rw'} private anon fixed\n" for i in range(limit - left - 2)
    )
    program = parse(text + "mremap arena[0] 1 maymove fixed to arena[1000]\n").operations
    profile = probed.profile
    other = profile.with_rules(mremap_counts_exactly=not profile.mremap_counts_exactly)
    with setting(LIMIT, str(limit)):
        assert disagreements(program, profile, CPU) == []
        if left in (4, 5):
            assert disagreements(program, other, CPU) != []
