"""The model against the kernel of the guest: random programs with a fresh seed, every kept scenario, and the rules that
only some of these kernels, or only a changed setting, can show."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import parse, parse_op
from pagelens.proof.campaign import Bench, fuzz
from pagelens.proof.compare import Comparison
from pagelens.proof.mix import GENERATOR, Mix
from pagelens.proof.oracle import Oracle
from pagelens.proof.probes import (
    Probed,
    disagreements,
    left_out,
    probe_profile,
    probe_program,
)
from pagelens.vm.units import HPAGE_SIZE, PAGE_SIZE
from support.machine import HERE
from support.scenarios import wrong_on_this_kernel
from support.system import setting

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = [
    *sorted((ROOT / "tests/model/scenarios").glob("*.plscn")),
    *sorted((ROOT / "docs/lab").glob("*.plscn")),
]
MMAP, FTRUNCATE, MEMFD_SECRET = 9, 77, 447
SHARED, ANON = 0x01, 0x22


@pytest.fixture(scope="module")
def probed() -> Probed:
    return probe_profile(machine=HERE)


def test_random_programs_agree(probed: Probed, guest: None, capsys: pytest.CaptureFixture[str]) -> None:
    """600 operations; the long runs are in docs/fidelity.md. CI gives the seed: fresh with each commit."""
    seed = int(os.environ.get("PAGELENS_FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))
    with capsys.disabled():
        print(f"\nfuzz: seed {seed} of generator {GENERATOR}, {probed.text}")
    result = fuzz(Bench(probed.profile, HERE), seed, 600, Mix(without=left_out(HERE)), small=False)
    assert result.scenario == "", f"seed {seed}"
    assert result.agreement.succeeded >= 0.6 * result.agreement.operations


def test_every_scenario_holds(probed: Probed, guest: None) -> None:
    """The kept ones and the course's. On the host, tests/proof and tests/lab do the same, one by one."""
    wrong = {path.stem: wrong_on_this_kernel(path, probed.profile) for path in SCENARIOS}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_sticky_soft_dirty(probed: Probed) -> None:
    if not probed.profile.soft_dirty:
        pytest.skip("missing capability: soft-dirty")
    profile = probed.profile
    other = profile.with_rules(sticky_softdirty=not profile.sticky_softdirty)
    program = probe_program("sticky_softdirty")
    assert disagreements(program, profile, HERE) == []
    assert disagreements(program, other, HERE) != []


def test_the_vma_limit_of_mremap(probed: Probed) -> None:
    """A move with few vmas left below the limit, which is lowered to little more than this process needs. To 6.16 all
    of mremap counts roughly, so the rule decides from 6.17 on."""
    limit = len(Path("/proc/self/maps").read_text().splitlines()) + 60
    profile = probed.profile
    other = profile.with_rules(mremap_counts_exactly=not profile.mremap_counts_exactly)
    caught = False
    with setting("/proc/sys/vm/max_map_count", str(limit)), Oracle(HERE) as oracle:
        right, inverted = ModelWorld(profile, oracle.setting), ModelWorld(other, oracle.setting)
        last = limit - 2 - 3  # the harness has two vmas; three are left
        for i in range(last):
            op = parse_op(f"mmap 1 at arena[{i}] {'r' if i % 2 else 'rw'} private anon fixed")
            outcome = oracle.apply(op)
            assert outcome == right.apply(op) == inverted.apply(op)
        comparison = Comparison(oracle, right, soft_dirty=profile.soft_dirty)
        for left in (3, 4, 5, 6):
            move = parse_op("mremap arena[0] 1 maymove fixed to arena[1000]")
            assert [str(d) for d in comparison.step(move)] == [], left
            outcome = comparison.outcomes[0]
            assert outcome is not None
            caught = caught or inverted.apply(move) != outcome
            if outcome.result >= 0:
                break
            last -= 1
            free = parse_op(f"munmap arena[{last}]")
            assert [str(d) for d in comparison.step(free)] == []
            inverted.apply(free)
    assert caught == profile.mremap_checks_first


def test_where_a_file_without_a_method_of_its_own_lies(probed: Probed) -> None:
    """get_unmapped_area of a whole huge page (thp_align_file_test): secret memory has no method of its own."""
    profile = probed.profile
    with Oracle(HERE) as oracle:
        fd = oracle.call("main", MEMFD_SECRET, 0).result
        if fd < 0:
            pytest.skip("missing capability: memfd_secret")
        assert oracle.call("main", FTRUNCATE, fd, HPAGE_SIZE).result == 0
        oracle.call("main", MMAP, 0, PAGE_SIZE, 3, ANON, -1, 0)
        real = oracle.call("main", MMAP, 0, HPAGE_SIZE, 3, SHARED, fd, 0).result
        where = {}
        for rule in (False, True):
            world = ModelWorld(profile.with_rules(thp_align_file_test=rule), oracle.setting)
            process = world.processes["main"]
            process.mmap(0, PAGE_SIZE, 3, ANON)
            where[rule] = process.mmap(0, HPAGE_SIZE, 3, SHARED, world.machine.file("secret", HPAGE_SIZE), 0)
    assert real == where[profile.thp_align_file_test]
    assert (where[False] != where[True]) == (profile.thp and profile.thp_align_anon)


def test_strict_overcommit(probed: Probed) -> None:
    """vm.overcommit_memory 2: what is charged, what not, and what is refused; sizes far from the limit, because others
    charge as well."""
    with setting("/proc/sys/vm/overcommit_memory", "2"):
        figures = {
            line.split(":")[0]: int(line.split()[1]) * 1024 // PAGE_SIZE
            for line in Path("/proc/meminfo").read_text().splitlines()
        }
        size = (figures["CommitLimit"] - figures["Committed_AS"]) * 6 // 10
        program = parse(f"""\
            a = mmap {size} rw private anon
            mmap {size} rw private anon
            mmap {size} rw private anon noreserve
            mmap {size} rw shared anon
            c = mmap {size} r private anon
            mprotect c[0:{size}] rw
            munmap a[0:{size}]
            mprotect c[0:{size}] rw
            q = fork
            munmap c[0:{size}]
            q = fork
            """)
        with Oracle(HERE) as oracle:
            world = ModelWorld(probed.profile, oracle.setting)
            world.machine.committed = figures["Committed_AS"]
            comparison = Comparison(oracle, world, soft_dirty=probed.profile.soft_dirty)
            results = []
            for op in program.operations:
                assert [str(d) for d in comparison.step(op)] == []
                outcome = comparison.outcomes[0]
                assert outcome is not None
                results.append(outcome.result == -12)
        assert results == [False, True, True, True, False, True, False, False, True, False, False]
