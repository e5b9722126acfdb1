"""Which rules does this kernel follow? Found by trying: a few operations for each rule of the profile.

Distributions backport, so a version says little (6.18.44 has VM_MAYBE_GUARD of 6.19, 6.12 stable has mremap
fixes of 7.0). Each probe is a program on which the rule makes a difference; it runs on the kernel and in the
model with the rule both ways. The profile that agrees with most probes is the base, and single rules are
turned where only the other value agrees. The same programs are the scenarios that show each rule's effect
(tests/proof).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagelens.model.op import Op, Outcome
from pagelens.model.profile import PROFILES, Profile
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import parse, parse_op
from pagelens.proof.checkpoint import Disagreement
from pagelens.proof.compare import SOFT_DIRTY, Comparison
from pagelens.proof.machine import Local, Machine
from pagelens.proof.oracle import Oracle
from pagelens.vm.errors import CapabilityMissingError, UsageError

# rule -> program. Where a rule needs another one (a guard page on a kernel without them), the probe agrees
# either way and the base profile's value stands.
PROBES: dict[str, str] = {
    "merge_unfaulted_target": """\
        mmap 2 at arena[0] rw private anon fixed
        mmap 2 at arena[2] rwx private anon fixed
        write arena[2]
        mprotect arena[2:4] rw
        """,
    "mmap_merges_right_first": """\
        mmap 2 at arena[0] rw private anon fixed
        write arena[0]
        mmap 2 at arena[4] rw private anon fixed
        write arena[4]
        mmap 2 at arena[2] rw private anon fixed
        """,
    "above4g_is_known": """\
        f = memfd 1
        mmap 1 at arena[0] rw fixed flags=0x83 file f[0]
        """,
    "mprotect_wants_dirty": """\
        mmap 4 at arena[0] rw private anon fixed
        write arena[0:4]
        madvise arena[0:2] free
        mprotect arena[0:4] r
        mprotect arena[0:4] rw
        write arena[0:4]
        """,
    "mmap_gathers_first": """\
        mmap 8 at arena[0] rw private anon fixed
        rlimit data 1
        mmap 4 at arena[2] rw private anon fixed
        mmap 8 at arena[4] rw private anon fixed
        """,
    "merge_close_forbids_any": """\
        shmat 4 at arena[0] rw
        mprotect arena[0:2] r
        mprotect arena[2] r
        """,
    "mprotect_unaccounts": """\
        mmap 2 at arena[0] r private anon fixed
        mmap 2 at arena[2] rw private anon fixed
        mprotect arena[2:4] r
        """,
    "stack_nohugepage": """\
        mmap 2 at arena[0] rw private anon fixed
        mmap 2 at arena[2] rw private anon fixed stack
        """,
    "thp_align_anon": "mmap 1 rw private anon\na = mmap 512 rw private anon",
    "droppable": "mmap 1 at arena[0] rw anon fixed flags=0x8",
    "guard_pages": "mmap 2 at arena[0] rw private anon fixed\nmadvise arena[0] guard_install",
    "pagemap_guard_bit": "mmap 2 at arena[0] rw private anon fixed\nmadvise arena[0] guard_install",
    "guard_file": "f = memfd 4\nmmap 2 at arena[0] rw private fixed file f\nmadvise arena[0] guard_install",
    "guard_vma_flag": "mmap 2 at arena[0] rw private anon fixed\nmadvise arena[0] guard_install",
    "sticky_softdirty": """\
        mmap 2 at arena[2] rwx private anon fixed
        clear_refs 4
        mmap 2 at arena[0] rw private anon fixed
        mprotect arena[2:4] rw
        """,
    "pt_reclaim": """\
        mmap 512 at arena[512] rw private anon fixed
        write arena[512]
        madvise arena[512:1024] dontneed
        """,
    "populate_stops_at_hole": """\
        mmap 1 at arena[0] rw private anon fixed
        mmap 1 at arena[2] rw private anon fixed
        madvise arena[0:3] populate_read
        """,
    "mremap_checks_first": """\
        mmap 2 at arena[0] rw private anon fixed
        mmap 4 at arena[8] rw private anon fixed
        mremap arena[1:3] 3 maymove fixed to arena[8]
        """,
    "mremap_multi_vma": """\
        mmap 2 at arena[0] rw private anon fixed
        mmap 2 at arena[2] r private anon fixed
        mremap arena[0:4] 4 maymove fixed to arena[8]
        """,
    "mremap_realigns": """\
        mmap 500 at arena[100] rw private anon fixed
        write arena[100]
        mremap arena[100:600] 500 maymove fixed dontunmap to 0x200000064000
        """,
    "dontunmap_self_merge": """\
        mmap 4 at arena[1] rw private anon fixed
        mremap arena[2:4] 2 maymove fixed dontunmap to arena[5]
        """,
    "dontunmap_resets_pgoff": """\
        mmap 1 at arena[0] rw private anon fixed
        write arena[0]
        mremap arena[0] 1 maymove fixed to arena[8]
        mremap arena[8] 1 maymove fixed dontunmap to arena[20]
        mmap 1 at arena[9] rw private anon fixed
        """,
    "dontunmap_pre_split": """\
        mmap 4 at arena[0] rw private anon fixed
        mlock arena[0:4]
        mremap arena[1:3] 2 maymove fixed dontunmap to arena[8]
        """,
    "dontunmap_locks_twice": """\
        mmap 2 at arena[0] rw private anon fixed
        mlock arena[0:2]
        mremap arena[0:2] 2 maymove fixed dontunmap to arena[8]
        """,
    "heap_name_overlaps": "brk heap[1]\nmmap 1 at heap[1] r private anon fixed",
    "pku": "mmap 2 at arena[0] x private anon fixed\nread arena[0]",
    "smaps_lockonfault": "mmap 1 at arena[0] rw private anon fixed\nmlock2 arena[0] onfault",
    "smaps_ksm": "mmap 1 at arena[0] rw private anon fixed",
    "last_page_needs_table": "f = disk 1\nmmap 2 at arena[0] r shared fixed file f\nread arena[1]",
    "ksm": "mmap 2 at arena[0] rw private anon fixed\nmadvise arena[0] mergeable",
    "thp": "mmap 2 at arena[0] rw private anon fixed\nmadvise arena[0] hugepage",
}
# Rules that no program of the oracle shows: they need a file without get_unmapped_area of its own, 65,530 vmas, or
# say what the comparison itself must leave out. soft_dirty is probed by itself.
NOT_PROBED = frozenset({"thp_align_file_test", "mremap_counts_exactly", "soft_dirty", "status_rss_lags"})


@dataclass(frozen=True, slots=True)
class Probed:
    """What probing found. turned: rules that differ from the base profile. unsettled: rules whose probe
    disagrees either way (then the model is wrong about this kernel, and `verify` will say where)."""

    profile: Profile
    base: str
    turned: dict[str, bool]
    unsettled: tuple[str, ...]

    @property
    def text(self) -> str:
        """ "linux-6.18 (probed; guard_vma_flag=1)"."""
        turned = ", ".join(f"{rule}={int(value)}" for rule, value in sorted(self.turned.items()))
        return f"{self.base} (by probing{'; ' + turned if turned else ''})"


def probe_program(rule: str) -> tuple[Op, ...]:
    """The operations of a rule's probe."""
    return parse(PROBES[rule], rule).operations


class _Once:
    # The kernel as several comparisons see it: an operation is done once, and everyone gets its outcome.
    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.setting, self.names = oracle.setting, oracle.names
        self.alive, self.is_leader, self.vmas = oracle.alive, oracle.is_leader, oracle.vmas
        self.pagemap, self.accounting, self.status = oracle.pagemap, oracle.accounting, oracle.status
        self.keys, self.pages, self.kpage = oracle.keys, oracle.pages, oracle.kpage
        self.statm, self.rollup = oracle.statm, oracle.rollup
        self._last: tuple[int, Outcome | None] = (-1, None)
        self.index = 0

    def apply(self, op: Op) -> Outcome | None:
        if self._last[0] != self.index:
            self._last = (self.index, self._oracle.apply(op))
        return self._last[1]


def compare_many(
    program: Sequence[Op], profiles: Sequence[Profile], machine: Machine | None = None
) -> list[list[Disagreement]]:
    """What differs when `program` runs once on this kernel and in the model of each profile; smaps and status
    too. One list a profile, to its first step with a disagreement."""
    with Oracle(machine) as oracle:
        once = _Once(oracle)
        comparisons = [
            Comparison(once, ModelWorld(p, oracle.setting), soft_dirty=p.soft_dirty) for p in profiles
        ]
        found: list[list[Disagreement]] = [[] for _ in profiles]
        for once.index, op in enumerate(program):
            # All of them do it, also those that have failed: the model must stay in step.
            steps = [c.step(op) for c in comparisons]
            found = [old or new for old, new in zip(found, steps, strict=True)]
        return [f or c.checkpoint() for f, c in zip(found, comparisons, strict=True)]


def disagreements(
    program: Sequence[Op], profile: Profile, machine: Machine | None = None
) -> list[Disagreement]:
    """`compare_many` for one profile."""
    return compare_many(program, [profile], machine)[0]


def has_soft_dirty(machine: Machine | None = None) -> bool:
    """Whether bit 55 works: clean after clear_refs, dirty after a write. (A kernel without
    CONFIG_MEM_SOFT_DIRTY accepts the clear and shows clean pages for ever.)"""
    with Oracle(machine) as oracle:
        states = []
        for text in (
            "mmap 1 at arena[0] rw private anon fixed",
            "write arena[0]",
            "clear_refs 4",
            "write arena[0]",
        ):
            oracle.apply(parse_op(text))
            start = oracle.names.regions["arena"]
            states.append(bool(int(oracle.pagemap("main", start, 1)[0]) & SOFT_DIRTY))
        return states[1:] == [True, False, True]


def has_protection_keys(machine: Machine | None = None) -> bool:
    """Whether a mapping that may only be executed gets a protection key of its own (execute_only_pkey), so
    that reads of it end in SEGV_PKUERR. The model has no keys; such mappings are left out then."""
    with Oracle(machine) as oracle:
        oracle.apply(parse_op("mmap 1 at arena[0] x private anon fixed"))
        outcome = oracle.apply(parse_op("read arena[0]"))
        return outcome is not None and outcome.code == 4


def left_out(machine: Machine | None = None) -> frozenset[str]:
    """What random programs leave out on this machine (`Mix.without`)."""
    out = {"exec_only"} if has_protection_keys(machine) else set()
    if not has_disk(machine):
        out.add("disk")
    return frozenset(out)


def has_disk(machine: Machine | None = None) -> bool:
    """Whether files on disk can be made there."""
    with Oracle(machine) as oracle:
        try:
            oracle.apply(parse_op("f = disk 1"))
        except CapabilityMissingError:
            return False
        return True


def probe_profile(base: str | None = None, machine: Machine | None = None) -> Probed:
    """The profile of this kernel. `base` fixes the base profile; then only configuration (soft-dirty, KSM,
    THP) is probed, so that a wrong profile stays wrong and `verify` catches it."""
    soft_dirty = has_soft_dirty(machine)
    if base is not None:
        profile = _configured(_named(base), soft_dirty)
        return Probed(*_turn(profile, base, ("ksm", "thp", "pku"), machine))
    programs = {rule: probe_program(rule) for rule in PROBES}
    if not has_disk(machine):  # then the rules of its files stay as the base profile has them
        programs = {rule: ops for rule, ops in programs.items() if all(op.name != "disk" for op in ops)}
    release = str((machine or Local()).facts()["release"])
    names = sorted(name for name in PROFILES if name.startswith("linux-"))
    profiles = [_configured(PROFILES[name], soft_dirty) for name in names]
    wrong: list[set[str]] = [set() for _ in names]

    def look(rules: Iterable[str]) -> int:
        for rule in rules:
            for i, found in enumerate(compare_many(programs[rule], profiles, machine)):
                (wrong[i].add if found else wrong[i].discard)(rule)
        # Of profiles that are equally right the one of the nearest release.
        return min(range(len(names)), key=lambda i: (len(wrong[i]), distance(names[i], release)))

    best = look(programs)
    if wrong[best]:  # an unknown kernel, or a look that something disturbed
        best = look(sorted(wrong[best]))
    return Probed(*_turn(profiles[best], names[best], tuple(sorted(wrong[best])), machine))


def distance(name: str, release: str) -> int:
    """Between `linux-6.12` and a release like `6.12.117+deb13-cloud-amd64`, in releases (a new major: twenty)."""

    def number(text: str) -> int:
        found = re.search(r"(\d+)\.(\d+)", text)
        return int(found[1]) * 20 + int(found[2]) if found else 0

    return abs(number(name) - number(release))


def _named(name: str) -> Profile:
    try:
        return PROFILES[name]
    except KeyError:
        raise UsageError(f"no kernel profile {name!r}; profiles: {', '.join(PROFILES)}") from None


def _configured(profile: Profile, soft_dirty: bool) -> Profile:
    return profile if profile.soft_dirty == soft_dirty else profile.with_rules(soft_dirty=soft_dirty)


def _turn(
    profile: Profile, base: str, rules: tuple[str, ...], machine: Machine | None
) -> tuple[Profile, str, dict[str, bool], tuple[str, ...]]:
    # Twice, because one rule may hide behind another (a guard page that merges).
    turned: dict[str, bool] = {}
    unsettled: list[str] = []
    for _ in range(2):
        unsettled = []
        for rule in rules:
            other = profile.with_rules(**{rule: not getattr(profile, rule)})
            right, inverted = compare_many(probe_program(rule), [profile, other], machine)
            if right and inverted:
                unsettled.append(rule)
            elif right:
                profile = other
                turned[rule] = getattr(other, rule)
        if not unsettled:
            break
    clean = {rule: getattr(profile, rule) for rule in profile.rules()}
    same = {r: v for r, v in clean.items() if getattr(PROFILES[base], r) != v}
    return PROFILES[base].with_rules(**same) if same else PROFILES[base], base, turned, tuple(unsettled)
