"""What `why` shows: the causes of a whole capture, of a range, of a page; as plain dicts, the same for table
and JSON ({"subject", "verdicts", "agreement"}, docs/schemas/why.json)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pagelens.capture.reader import Capture
from pagelens.vm.errors import UsageError
from pagelens.vm.snapshot import Snapshot
from pagelens.why.agreement import agreement
from pagelens.why.causes import BY_SLUG
from pagelens.why.classified import Classified
from pagelens.why.explain import Explainer, call_row
from pagelens.why.verdict import AMBIGUOUS, CERTAIN, DOC, UNKNOWN, Verdict

EXAMPLES = 2  # evidence rows of single faults that stand beside the figures of a cause


def whole(capture: Capture, result: Classified) -> dict[str, Any]:
    """All faults by cause."""
    explain = Explainer(result)
    verdicts = []
    for row in result.counts():
        cause = str(row["cause"])
        figures = {k: row[k] for k in ("faults", "pages", "share", "time_ns")}
        mine = [i for i, j in enumerate(result.judgements) if j.verdict.cause == cause]
        rows = np.flatnonzero(np.isin(result.verdict, mine))
        examples = [explain.fault(int(r)) for r in rows[:EXAMPLES]]
        examples += [call_row(c, "the call") for c, slug in result.calls if slug == cause][
            : EXAMPLES - len(examples)
        ]
        verdicts.append(_entry(cause, _confidence(result, rows), [figures, *examples]))
    return _answer({"capture": str(capture.path), "faults": _total(result)}, verdicts, result)


def page(capture: Capture, result: Classified, addr: int, mm: int | None) -> dict[str, Any]:
    """Every fault on one page, with what each verdict rests on; where there was none, what is known
    instead.
    """
    explain = Explainer(result)
    rows = explain.on_page(addr, mm)
    verdicts = [_of(explain.verdict(row)) for row in rows]
    subject: dict[str, Any] = {"capture": str(capture.path), "address": f"{addr:#x}", "faults": len(rows)}
    if mm is not None:
        subject["mm"] = mm
    notes = _without_fault(result, addr, mm) if not rows else []
    if notes:
        subject["notes"] = notes
    return _answer(subject, verdicts, result)


def span(
    capture: Capture, result: Classified, start: int, end: int, mm: int | None, what: str
) -> dict[str, Any]:
    """The faults of [start, end) by cause."""
    explain = Explainer(result)
    rows = explain.in_range(start, end, mm)
    by_cause: dict[str, list[int]] = {}
    for row in rows:
        by_cause.setdefault(result.of(row).cause, []).append(row)
    verdicts = []
    for cause, mine in sorted(by_cause.items(), key=lambda item: -len(item[1])):
        faults = result.run.faults
        index = np.array(mine)
        latency = faults.latency[index]
        figures = {
            "faults": len(mine),
            "pages": len(np.unique(faults.addr[index] >> np.uint64(12))),
            "share": len(mine) / len(rows),
            "time_ns": int(latency[latency > 0].sum()),
        }
        examples = [explain.fault(r) for r in mine[:EXAMPLES]]
        verdicts.append(_entry(cause, _confidence(result, index), [figures, *examples]))
    subject: dict[str, Any] = {
        "capture": str(capture.path),
        "range": f"{start:#x}-{end:#x}",
        "what": what,
        "faults": len(rows),
    }
    if mm is not None:
        subject["mm"] = mm
    return _answer(subject, verdicts, result)


def vma(capture: Capture, result: Classified, number: int, mm: int | None) -> dict[str, Any]:
    """The faults of vma `number` of the last snapshot of `mm` (first one, if there is no last; `mm` is by
    default the address space with most faults). UsageError where there is no such vma."""
    mm = main_mm(result) if mm is None else mm
    snapshot: Snapshot | None = result.facts.last.get(mm) or result.facts.first.get(mm)
    if snapshot is None:
        raise UsageError(f"the capture has no snapshot of mm {mm}; give an address or a range instead")
    if not 0 <= number < len(snapshot.vmas):
        raise UsageError(f"mm {mm} has vmas 0 to {len(snapshot.vmas) - 1}, not {number}")
    found = snapshot.vmas[number]
    return span(capture, result, found.start, found.end, mm, str(found))


def main_mm(result: Classified) -> int:
    """The address space with most faults."""
    mms = result.run.faults.mm
    if not len(mms):
        raise UsageError("the capture has no faults")
    numbers, counts = np.unique(mms, return_counts=True)
    return int(numbers[int(np.argmax(counts))])


def table_rows(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row a verdict, for tables, CSV and Parquet."""
    out = []
    for verdict in answer["verdicts"]:
        first = verdict["evidence"][0] if verdict["evidence"] else {}
        row = {k: verdict[k] for k in ("cause", "confidence", "remedy", "doc")}
        row["title"] = title(verdict["cause"])
        if "faults" in first:
            row |= {k: first[k] for k in ("faults", "pages", "share", "time_ns")}
        else:
            row |= {"seq": first.get("seq"), "what": first.get("what"), "latency_ns": first.get("latency_ns")}
        out.append(row)
    return out


def title(cause: str) -> str:
    """The cause in words."""
    rule = BY_SLUG.get(cause)
    if rule is not None:
        return rule.title
    return {"unknown": "no rule fits", "ambiguous": "several causes fit"}.get(cause, cause)


def _entry(cause: str, confidence: str, evidence: list[dict[str, Any]]) -> dict[str, Any]:
    rule = BY_SLUG.get(cause)
    return {
        "cause": cause,
        "confidence": confidence,
        "evidence": evidence,
        "remedy": rule.remedy if rule else "",
        "doc": rule.doc if rule else f"{DOC}#{cause}",
    }


def _of(verdict: Verdict) -> dict[str, Any]:
    entry = _entry(verdict.cause, verdict.confidence, list(verdict.evidence))
    entry["evidence"] = [*entry["evidence"], {"role": "why", "what": verdict.why}]
    if verdict.candidates:
        entry["evidence"].append({"role": "candidates", "what": " or ".join(verdict.candidates)})
    return entry


def _confidence(result: Classified, rows: Any) -> str:
    # Of a group: the weakest that at least one in ten of its faults has, so that a crowd of guesses shows.
    seen = Counter(result.of(int(r)).confidence for r in rows[:2000])
    if not seen:
        return CERTAIN
    for word in (UNKNOWN, AMBIGUOUS, "likely"):
        if seen[word] * 10 >= sum(seen.values()):
            return word
    return CERTAIN


def _total(result: Classified) -> int:
    return len(result.run.faults) + sum(c.gup for c, _ in result.calls)


def _answer(subject: dict[str, Any], verdicts: list[dict[str, Any]], result: Classified) -> dict[str, Any]:
    return {"subject": subject, "verdicts": verdicts, "agreement": agreement(result)}


def _without_fault(result: Classified, addr: int, mm: int | None) -> list[str]:
    notes = []
    for number, space in sorted(result.run.spaces.items()):
        if mm is not None and number != mm:
            continue
        i = space.index(addr)
        past = next((p for p in reversed(space.past) if p[3].start <= addr < p[3].end), None)
        seg = space.segs[i] if i >= 0 else past[3] if past else None
        if seg is None:
            continue
        state = space.lives.states[seg.state]
        text = f"mm {number}: no fault; mapped {seg.start:#x}-{seg.end:#x}"
        text += f" ({state.name or state.area.name.lower()})"
        last = result.facts.last.get(number)
        if state.populated >= 0:
            text += "; a call made it present (mlock, MAP_POPULATE or madvise)"
        elif i < 0 and past is not None:
            text += f"; never touched, and unmapped by seq {past[2]}"
        elif last is not None and last.pages is not None:
            there = len(last.pages.clipped(addr & ~0xFFF, (addr & ~0xFFF) + 0x1000)) > 0
            text += (
                "; present at the end: mapped around another fault, by fork or execve, or a huge page"
                if there
                else "; never touched"
            )
        notes.append(text)
    return notes or ["no address space of the capture ever mapped it, and nobody faulted there"]
