"""Each cause on the smallest evidence that makes it, and what rules may overlap."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from pagelens.why.causes import BY_SLUG, RULES
from pagelens.why.evidence import (
    FIELDS,
    Area,
    Cut,
    Evidence,
    Forked,
    Guarded,
    Huge,
    Mark,
    Origin,
    Outcome,
    Prior,
    Race,
    Sharers,
    evidence,
    pack,
    unpack,
)
from pagelens.why.judge import judge

W = {"write": True}
COW = {"present": True, "write": True, "prior": Prior.ANON}

CASES: list[tuple[str, str, Evidence]] = [
    ("first-write", "certain", evidence(**W)),
    ("first-write", "certain", evidence(**W, origin=Origin.BRK)),
    ("first-read", "certain", evidence()),
    ("zero-page-write", "certain", evidence(present=True, write=True, prior=Prior.ZERO)),
    ("zero-page-write", "certain", evidence(present=True, write=True, huge=Huge.READ)),
    ("file-page-cached", "certain", evidence(area=Area.FILE)),
    ("file-page-cached", "certain", evidence(area=Area.SHARED_FILE, write=True)),
    ("file-page-disk", "likely", evidence(area=Area.FILE, major=True)),
    ("shared-page", "certain", evidence(area=Area.SHMEM, write=True)),
    ("file-cow", "certain", evidence(area=Area.FILE, write=True)),
    ("file-cow", "certain", evidence(area=Area.FILE, write=True, present=True, prior=Prior.FILE)),
    (
        "file-cow",
        "certain",
        evidence(area=Area.FILE, write=True, present=True, prior=Prior.FILE, forked=Forked.CHILD),
    ),
    ("fork-cow-parent", "certain", evidence(**COW, forked=Forked.PARENT, sharers=Sharers.LIVE)),
    ("fork-cow-child", "certain", evidence(**COW, forked=Forked.CHILD, sharers=Sharers.LIVE)),
    (
        "fork-cow-child",
        "certain",
        evidence(**COW, area=Area.FILE, forked=Forked.CHILD, sharers=Sharers.LIVE),
    ),
    ("sharers-gone", "ambiguous", evidence(**COW, forked=Forked.PARENT, sharers=Sharers.GONE)),
    (
        "sharers-gone",
        "certain",
        evidence(**COW, forked=Forked.PARENT, sharers=Sharers.GONE, outcome=Outcome.REUSED),
    ),
    ("ambiguous", "ambiguous", evidence(**COW, forked=Forked.PARENT, sharers=Sharers.UNCLEAR)),
    ("ambiguous", "ambiguous", evidence(**COW, forked=Forked.PARENT, sharers=Sharers.UNSEEN)),
    ("write-notify", "certain", evidence(area=Area.SHARED_FILE, write=True, present=True, prior=Prior.FILE)),
    ("mprotect-upgrade", "likely", evidence(**COW, rearmed=True)),
    ("stack-growth", "certain", evidence(write=True, grew=True, origin=Origin.GROWTH)),
    ("after-dontneed", "certain", evidence(write=True, dropped=True, origin=Origin.DONTNEED)),
    ("first-write", "certain", evidence(write=True, dropped=False, origin=Origin.DONTNEED)),
    ("after-free", "certain", evidence(write=True, prior=Prior.ANON, mark=Mark.FREE)),
    ("after-pageout", "certain", evidence(prior=Prior.ANON, mark=Mark.PAGEOUT, major=True)),
    ("after-cold", "likely", evidence(prior=Prior.ANON, mark=Mark.COLD)),
    ("after-truncate", "certain", evidence(area=Area.SHMEM, dropped=True, origin=Origin.CUT)),
    ("after-truncate", "certain", evidence(area=Area.FILE, dropped=True, origin=Origin.CUT)),
    ("ambiguous", "ambiguous", evidence(area=Area.FILE, dropped=True, paged=True, origin=Origin.DONTNEED)),
    ("ambiguous", "ambiguous", evidence(area=Area.SHMEM, dropped=True, paged=True, origin=Origin.CUT)),
    ("swap-in", "certain", evidence(prior=Prior.SWAPPED)),
    ("swap-in", "likely", evidence(prior=Prior.ANON, major=True)),
    ("userfaultfd", "certain", evidence(write=True, uffd=True, race=Race.HANDLER)),
    ("userfaultfd", "likely", evidence(**COW, uffd=True, guarded=Guarded.UFFD)),
    ("soft-dirty", "likely", evidence(**COW, guarded=Guarded.CLEARED)),
    ("ksm-cow", "likely", evidence(**COW, guarded=Guarded.KSM)),
    (
        "fork-cow-child",
        "certain",
        evidence(**COW, guarded=Guarded.KSM, forked=Forked.CHILD, sharers=Sharers.LIVE),
    ),
    ("zero-page-write", "certain", evidence(**W, present=True, prior=Prior.ZERO, guarded=Guarded.CLEARED)),
    ("huge-page", "likely", evidence(write=True, huge=Huge.MADE)),
    ("hugetlb", "certain", evidence(write=True, area=Area.HUGETLB)),
    ("numa-hint", "likely", evidence(prior=Prior.ANON, numa=True)),
    ("numa-hint", "likely", evidence(**COW, numa=True, guarded=Guarded.BACK)),
    ("unmapped-by-kernel", "likely", evidence(**COW, guarded=Guarded.BACK)),
    ("swap-in", "likely", evidence(**COW, numa=True, guarded=Guarded.BACK_DISK)),
    ("after-free", "likely", evidence(**COW, guarded=Guarded.BACK, mark=Mark.FREE)),
    ("after-pageout", "likely", evidence(**COW, guarded=Guarded.BACK_DISK, mark=Mark.PAGEOUT)),
    ("after-cold", "likely", evidence(**COW, guarded=Guarded.BACK_DISK, mark=Mark.COLD)),
    ("unmapped-by-kernel", "likely", evidence(prior=Prior.ANON)),
    ("special-page", "certain", evidence(area=Area.SPECIAL)),
    ("invalid-unmapped", "certain", evidence(failed=True, area=Area.UNMAPPED)),
    ("invalid-permission", "certain", evidence(failed=True, write=True, present=True, writable=False)),
    ("invalid-end-of-file", "likely", evidence(failed=True, area=Area.FILE)),
    ("gave-up", "likely", evidence(failed=True)),
    ("spurious", "certain", evidence(write=True, prior=Prior.ANON, race=Race.THREAD)),
    ("spurious", "likely", evidence(write=True, prior=Prior.ANON, race=Race.LATE)),
    ("spurious", "likely", evidence(area=Area.FILE, prior=Prior.FILE, race=Race.LATE)),
    ("file-page-disk", "likely", evidence(area=Area.FILE, prior=Prior.FILE, race=Race.LATE, major=True)),
    ("after-free", "certain", evidence(write=True, prior=Prior.ANON, mark=Mark.FREE, race=Race.LATE)),
    ("spurious", "likely", evidence(**COW)),
    ("kernel-access", "certain", evidence(write=True, user=False, in_call=True)),
    ("unknown", "unknown", evidence(area=Area.UNSEEN)),
    ("unknown", "unknown", evidence(area=Area.UNMAPPED)),
    ("ambiguous", "ambiguous", evidence(known=False)),
    ("ambiguous", "ambiguous", evidence(**W, cut=Cut.HISTORY)),
    ("first-write", "likely", evidence(**W, cut=Cut.MAPPING)),
    ("unknown", "unknown", evidence(area=Area.UNSEEN, cut=Cut.HISTORY)),
]


@pytest.mark.parametrize(("cause", "confidence", "given"), CASES)
def test_each_cause_from_its_evidence(cause: str, confidence: str, given: Evidence) -> None:
    verdict = judge(given).verdict
    assert (verdict.cause, verdict.confidence) == (cause, confidence), verdict.why
    assert verdict.why
    if cause in BY_SLUG:
        assert verdict.doc.endswith("#" + cause)
        assert verdict.remedy


def test_every_rule_has_a_case() -> None:
    assert {rule.slug for rule in RULES} <= {cause for cause, _, _ in CASES}


def test_kernel_access_names_what_the_page_needed() -> None:
    judged = judge(evidence(write=True, user=False, in_call=True))
    assert (judged.verdict.cause, judged.page) == ("kernel-access", "first-write")
    assert "first-write" in judged.verdict.why


def test_what_max_size_dropped_is_named() -> None:
    verdict = judge(evidence(**W, cut=Cut.HISTORY)).verdict
    assert "--max-size" in verdict.why
    assert verdict.candidates == ("first-write",)
    assert "--max-size" in judge(evidence(area=Area.UNSEEN, cut=Cut.HISTORY)).verdict.why


def test_packing_loses_nothing() -> None:
    for _, _, given in CASES:
        code = pack({name: int(getattr(given, name)) for name in FIELDS[1:]} | {FIELDS[0]: _array(given)})
        assert unpack(int(code[0])) == given


def _array(given: Evidence):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.array([int(given.known)])


# Pairs that the evidence cannot always tell apart; any other overlap is a rule that claims too much.
OVERLAPS = {
    frozenset({"fork-cow-parent", "sharers-gone"}),
    frozenset({"fork-cow-child", "sharers-gone"}),
    frozenset({"fork-cow-child", "fork-cow-parent"}),  # attached after the fork
    # Slow and alone in its block, of which nobody knows whether it was empty.
    *(frozenset({"huge-page", first}) for first in ("first-read", "first-write", "shared-page")),
    frozenset({"file-cow", "soft-dirty"}),  # what mlock did to a page of a file before the clear
}


def test_rules_overlap_only_where_evidence_cannot_decide() -> None:
    seen = set()
    axes = {
        "present": (False, True),
        "write": (False, True),
        "area": tuple(Area),
        "prior": tuple(Prior),
        "forked": tuple(Forked),
        "mark": tuple(Mark),
        "race": (Race.NONE, Race.THREAD, Race.LATE),
        "huge": tuple(Huge),
        "dropped": (False, True),
        "numa": (False, True),
        "guarded": (Guarded.NONE, Guarded.CLEARED, Guarded.BACK, Guarded.BACK_DISK),
        "rearmed": (False, True),
        "failed": (False, True),
    }
    share = {Forked.NONE: (Sharers.NA,), Forked.PARENT: tuple(Sharers)[1:], Forked.CHILD: tuple(Sharers)[1:]}
    plain = evidence(sharers=Sharers.NA)
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        if not _consistent(given):
            continue
        for sharers in share[given["forked"]]:
            e = replace(plain, **given, sharers=sharers)
            held = [rule.slug for rule in RULES if rule.holds(e) is not None]
            seen |= {frozenset(pair) for pair in itertools.combinations(held, 2)}
    assert seen <= OVERLAPS, sorted(map(sorted, seen - OVERLAPS))


def _consistent(g: dict[str, object]) -> bool:
    # What the replay can produce at all.
    if g["guarded"] is not Guarded.NONE and not (g["present"] and g["write"]):
        return False
    if g["dropped"] and g["prior"] is not Prior.NONE:
        return False
    if g["race"] is Race.LATE and (g["present"] or g["prior"] is Prior.NONE):
        return False
    if g["mark"] is not Mark.NONE and g["prior"] is Prior.NONE:
        return False
    if g["huge"] is not Huge.NO and g["area"] not in (Area.ANON, Area.SHMEM):
        return False
    if g["huge"] is Huge.MADE and g["present"]:
        return False
    if g["forked"] is not Forked.NONE and not (g["present"] and g["write"]):
        return False
    shared = g["area"] not in (Area.ANON, Area.FILE)
    if (shared and g["prior"] in (Prior.ANON, Prior.ZERO, Prior.SWAPPED)) or (
        not shared and g["prior"] is Prior.SHARED
    ):
        return False
    return not (g["area"] is Area.SPECIAL and g["prior"] is not Prior.NONE)
