"""Judge one evidence: run every rule, and say what comes of none, one or several that hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pagelens.why.causes import ACCESS, RULES, Finding, Rule
from pagelens.why.evidence import Area, Cut, Evidence, Forked, Gone, Huge, Prior, Race
from pagelens.why.verdict import AMBIGUOUS, CERTAIN, LIKELY, UNKNOWN, Verdict


@dataclass(frozen=True, slots=True)
class Judgement:
    """verdict: the cause of the fault. page: what the page needed (a slug; differs from the verdict's cause
    only where the kernel accessed the page)."""

    verdict: Verdict
    page: str


def judge(e: Evidence, rules: Sequence[Rule] = RULES) -> Judgement:
    """The verdict on one evidence. `rules` is there for tests that break one on purpose."""
    page = _as_far_as_kept(e, _page_verdict(e, rules))
    found = ACCESS.holds(e)
    if found is None:
        return Judgement(page, page.cause)
    needed = {"unknown": "", "ambiguous": f"; what the page needed: {' or '.join(page.candidates)}"}.get(
        page.cause, f"; what the page needed: {page.cause}"
    )
    access = Verdict(ACCESS.slug, found.confidence, found.why + needed, ACCESS.remedy, ACCESS.doc)
    return Judgement(access, page.cause)


def _page_verdict(e: Evidence, rules: Sequence[Rule]) -> Verdict:
    if e.known:
        held = _holding(e, rules)
    elif e.inferred:
        held = _holding(replace(e, known=True), rules)
    else:
        held = _without_error_code(e, rules)
    if not held:
        why = "the recording began after the page was mapped" if e.area.name == "UNSEEN" else "no rule fits"
        return Verdict("unknown", UNKNOWN, f"{why}: {describe(e)}")
    if len(held) == 1:
        (rule, finding) = next(iter(held.values()))
        confidence = finding.confidence if e.known or finding.confidence == AMBIGUOUS else LIKELY
        candidates = ("reused", "copied") if confidence == AMBIGUOUS else ()
        return Verdict(rule.slug, confidence, finding.why, rule.remedy, rule.doc, candidates)
    slugs = tuple(held)
    return Verdict("ambiguous", AMBIGUOUS, "the evidence fits several causes", candidates=slugs)


def _as_far_as_kept(e: Evidence, verdict: Verdict) -> Verdict:
    # --max-size dropped the oldest events: what they may have told is open.
    if e.cut is Cut.NONE:
        return verdict
    if e.cut is Cut.MAPPING:
        confidence = LIKELY if verdict.confidence == CERTAIN else verdict.confidence
        why = f"{verdict.why}; what mapped it may have been dropped by --max-size"
        return replace(verdict, confidence=confidence, why=why)
    if verdict.cause == "unknown":
        return replace(verdict, why=f"earlier events were dropped by --max-size; {verdict.why}")
    fits = verdict.candidates or (verdict.cause,)
    why = f"earlier events were dropped by --max-size; those that are left fit {' or '.join(fits)}"
    return Verdict("ambiguous", AMBIGUOUS, why, candidates=fits)


def _holding(e: Evidence, rules: Sequence[Rule]) -> dict[str, tuple[Rule, Finding]]:
    out: dict[str, tuple[Rule, Finding]] = {}
    for rule in rules:
        finding = rule.holds(e)
        if finding is not None:
            out[rule.slug] = (rule, finding)
    return out


# What takes an act of the kernel that nobody sees: it explains what nothing else does.
_RARE = frozenset({"spurious", "unmapped-by-kernel"})
_TOUCHED = {
    Area.ANON: (Prior.ZERO, Prior.ANON),
    Area.FILE: (Prior.FILE, Prior.ANON),
    Area.SHARED_FILE: (Prior.FILE,),
    Area.SHMEM: (Prior.SHARED,),
}


def _without_error_code(e: Evidence, rules: Sequence[Rule]) -> dict[str, tuple[Rule, Finding]]:
    # perf without privilege, --detail lean: all that it may have been is tried.
    out: dict[str, tuple[Rule, Finding]] = {}
    for variant in _variants(e):
        out |= _holding(variant, rules)
    if e.race is Race.MAYBE:
        return out
    return {slug: held for slug, held in out.items() if slug not in _RARE} or out


def _variants(e: Evidence) -> Iterator[Evidence]:
    # Each access to each kind of memory that the evidence admits, with what may have been there before.
    unseen = e.area is Area.UNSEEN and not e.failed
    if e.uncalled and not e.failed and e.prior is not Prior.NONE:  # MADV_DONTNEED would not have been seen
        yield replace(e, known=True, prior=Prior.NONE, dropped=True)
    for area in _TOUCHED if unseen else (e.area,):
        if (unseen and e.prior is not Prior.NONE) or (
            e.unsure and area in _TOUCHED and e.prior is Prior.ANON
        ):
            before = _TOUCHED[area]
        else:
            before = (e.prior,)
        for prior in before:
            for present in (False, True):
                # Nothing but a fault or fault-around makes a page present, as far as this goes.
                alone = area is Area.ANON and prior is Prior.NONE and e.forked is Forked.NONE
                if present and alone and e.huge is Huge.NO and not e.failed:
                    continue
                for write in (False, True):
                    yield replace(e, known=True, area=area, prior=prior, present=present, write=write)


def describe(e: Evidence) -> str:
    """The evidence in a few words, for unknown verdicts and tests."""
    access = "write" if e.write else "fetch" if e.exec else "read"
    words = [
        "failed" if e.failed else "completed",
        access if e.known else "access (no error code)",
        "of a present page" if e.present else "of an absent page",
        f"area {e.area.name.lower()}",
        f"before: {e.prior.name.lower()}",
        f"life began by {e.origin.name.lower()}",
    ]
    for name in ("forked", "sharers", "mark", "race", "huge", "outcome", "guarded"):
        value = getattr(e, name)
        if value:
            words.append(f"{name} {value.name.lower()}")
    words += [f"perhaps {str(w.name).lower()}" for w in Gone if w in e.gone]
    words += [name for name in ("dropped", "grew", "uffd", "rearmed", "numa") if getattr(e, name)]
    return ", ".join(words)
