"""Model against this kernel: random programs agree, and a model that is wrong is caught."""

import os
import signal

import pytest

from pagelens.model import runner
from pagelens.model.files import File
from pagelens.model.machine import Machine as MachineModel
from pagelens.model.profile import PROFILES
from pagelens.model.scenario import parse, parse_op
from pagelens.proof.campaign import Bench, Result, fuzz
from pagelens.proof.checkpoint import Disagreement
from pagelens.proof.machine import Local
from pagelens.proof.mix import Mix
from pagelens.proof.probes import (
    NOT_PROBED,
    PROBES,
    Probed,
    disagreements,
    left_out,
    probe_profile,
    probe_program,
)
from pagelens.proof.reach import RULES
from support.machine import HERE, RELEASE, lives

UNREACHED = {"thp_align_file_test", "mremap_counts_exactly"}  # NOT_PROBED says why
GUARDS = ("pagemap_guard_bit", "guard_file", "guard_vma_flag")
# Rules that no probe can show without what this kernel may lack.
NEEDS = {"sticky_softdirty": "soft-dirty"}
ON_DISK = {rule for rule, program in PROBES.items() if "= disk" in program}


@pytest.fixture(scope="module")
def probed() -> Probed:
    return probe_profile(machine=HERE)


@pytest.fixture(scope="module")
def mix() -> Mix:
    return Mix(without=left_out(HERE))


def needs_disk(rule, mix):
    if rule in ON_DISK and "disk" in mix.without:
        pytest.skip("missing capability: disk (no file system that is known at /var/tmp)")


def test_random_programs_agree(probed, mix):
    """4,000 operations with fixed seeds; longer campaigns are in docs/fidelity.md."""
    result = fuzz(Bench(probed.profile, HERE), 1, 4000, mix)
    assert result.scenario == ""
    assert result.disagreements == []
    assert result.agreement.operations >= 4000
    assert result.agreement.succeeded >= 0.6 * result.agreement.operations
    assert all(fence.ok or fence.name == "damon" for fence in result.fences), result.fences
    # Each rule that programs can reach is reached; by 20,000 operations a hundred times and more.
    unreached = UNREACHED | (ON_DISK if "disk" in mix.without else set())
    assert [r for r in RULES if r not in unreached and result.reached[r] < 8] == []
    for kind, share in result.agreement.kinds.items():
        assert share.total > 0
        assert share.agreed == share.total or result.unrepeated, kind
        # A trivial predictor does worse in every kind, else the figure says nothing.
        assert share.trivial is None or share.trivial < share.total


@pytest.mark.parametrize("repeats", [False, True])
def test_what_does_not_repeat_is_counted_apart(repeats):
    """A disagreement that is gone when the same program runs again is the kernel's own doing."""
    seen = Disagreement("faults", 0, None, "main", "faults", "2", "1")

    class Stub:
        def fuzz_one(self, seed, length, mix, result):
            result.agreement.operations += length
            return [parse_op("munmap arena[0]")], [seen] if seed == 8 else []

        def run(self, program, result):
            return [seen] if repeats else []

        def shrunk(self, program, kinds):
            return list(program), [seen]

    result = fuzz(Stub(), 7, 1200, go_on=True)
    assert result.failed_seeds == ([8] if repeats else [])
    assert result.unrepeated == ([] if repeats else [(8, seen)])
    assert result.agreement.operations == 1200


def test_the_same_seed_gives_the_same_program(probed, mix):
    bench = Bench(probed.profile, HERE)
    first, second = (fuzz(bench, 42, 300, mix) for _ in range(2))
    assert first.used == second.used
    assert first.agreement.kinds["pages"].total == second.agreement.kinds["pages"].total


def test_the_profile_is_found_by_probing(probed):
    assert probed.unsettled == ()
    major, minor = map(int, RELEASE.split(".")[:2])
    if f"linux-{major}.{minor}" in PROFILES:
        assert probed.base == f"linux-{major}.{minor}"


@pytest.mark.parametrize("rule", sorted(PROBES))
def test_an_inverted_rule_is_caught(rule, probed, mix):
    """Each rule has a program on which it makes the difference: right as it is, wrong when inverted."""
    needs_disk(rule, mix)
    if rule in NEEDS and not probed.profile.soft_dirty:
        pytest.skip(f"this kernel lacks {NEEDS[rule]}, without which {rule} cannot be seen")
    program = probe_program(rule)
    assert disagreements(program, probed.profile, HERE) == []
    inverted = probed.profile.with_rules(**{rule: not getattr(probed.profile, rule)})
    if rule in GUARDS and not probed.profile.guard_pages:
        pytest.skip("this kernel has no guard pages, without which the rule cannot be seen")
    assert disagreements(program, inverted, HERE) != []


def test_every_rule_has_a_probe_or_a_reason():
    rules = set(next(iter(PROFILES.values())).rules())
    assert set(PROBES) | NOT_PROBED == rules
    assert not set(PROBES) & NOT_PROBED


@pytest.mark.parametrize("rule", sorted(PROBES))
def test_random_programs_catch_an_inverted_rule(rule, probed, mix):
    """Without being told where to look, within 20,000 operations (seed 5000: within two programs)."""
    needs_disk(rule, mix)
    if rule in NEEDS and not probed.profile.soft_dirty:
        pytest.skip(f"this kernel lacks {NEEDS[rule]}, without which {rule} cannot be seen")
    if rule in GUARDS and not probed.profile.guard_pages:
        pytest.skip("this kernel has no guard pages, without which the rule cannot be seen")
    if rule == "pku" and "exec_only" in mix.without:
        pytest.skip("this processor has protection keys; such mappings are left out of random programs")
    inverted = probed.profile.with_rules(**{rule: not getattr(probed.profile, rule)})
    result = fuzz(Bench(inverted, HERE), 5000, 20_000, mix, small=False)
    assert result.failed_seeds


class Unnoticed(File):
    """A file whose first writes nobody wants to know of."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.page_mkwrite = False


@pytest.mark.parametrize(
    ("of", "name", "wrong"),
    [(runner, "File", Unnoticed), (MachineModel, "page_mkclean", lambda *_: None)],
    ids=["no write-notify", "write-back leaves entries writable"],
)
def test_random_programs_catch_a_model_that_forgets_files_on_disk(of, name, wrong, probed, mix, monkeypatch):
    if "disk" in mix.without:
        pytest.skip("missing capability: disk (no file system that is known at /var/tmp)")
    monkeypatch.setattr(of, name, wrong)
    assert fuzz(Bench(probed.profile, HERE), 5000, 20_000, mix, small=False).failed_seeds


@pytest.mark.parametrize("rule", ["mprotect_unaccounts", "stack_nohugepage"])
def test_a_caught_rule_is_shrunk_to_a_few_lines(rule, probed, mix):
    inverted = probed.profile.with_rules(**{rule: not getattr(probed.profile, rule)})
    result = fuzz(Bench(inverted, HERE), 5000, 20_000, mix)
    assert 1 <= len(result.failing) <= 12
    assert result.scenario.startswith(f"# seed {result.seed}:")
    assert disagreements(result.failing, inverted, HERE) != []
    assert disagreements(result.failing, probed.profile, HERE) == []


def test_another_kernels_profile_is_caught(mix):
    other = "linux-6.1" if not RELEASE.startswith("6.1.") else "linux-6.18"
    wrong = probe_profile(other, HERE)
    assert fuzz(Bench(wrong.profile, HERE), 3, 20_000, mix, small=False).failed_seeds


@pytest.mark.skipif(
    not isinstance(HERE, Local),
    reason="missing capability: a child on this machine, to be killed (PAGELENS_ON is set)",
)
def test_a_child_that_dies_is_no_agreement(probed):
    """A child that somebody kills amid a program is counted, with how it ended, and nothing is left behind."""
    program = parse(
        "mmap 4 at arena[0] rw private anon fixed\nwrite arena[0]\nwrite arena[1]", "t"
    ).operations
    pids = []

    def watch(index, _op, comparison):
        if index == 1:
            pids.extend(comparison.kernel.pids)
            os.kill(pids[0], signal.SIGKILL)

    (found,) = Bench(probed.profile, HERE).run(program, Result(0), watch)
    assert (found.kind, found.index, found.model) == ("child", 2, "there")
    assert found.kernel == f"the oracle child 'main' (pid {pids[0]}) is gone: ended by SIGKILL"
    assert not lives(pids[0])
