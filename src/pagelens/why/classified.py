"""Classify: the cause of every fault of a capture, in columns.

The distinct evidences (a few dozen) are judged by the rules; faults get their verdict by index. Calls that
took faults by get_user_pages get a row too, weighted with their number, so that the shares add up to what
the kernel counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagelens.why.causes import PREFAULT, RULES, SLUGS, Rule
from pagelens.why.causes.prefault import of_call
from pagelens.why.evidence import unpack
from pagelens.why.facts import Call, Facts
from pagelens.why.features import features
from pagelens.why.history import History, trace
from pagelens.why.infer import infer
from pagelens.why.judge import Judgement, judge
from pagelens.why.replay import Replay, Replayed
from pagelens.why.verdict import AMBIGUOUS, CERTAIN, LIKELY, UNKNOWN, Verdict

I64 = npt.NDArray[np.int64]

CONFIDENCES = (CERTAIN, LIKELY, AMBIGUOUS, UNKNOWN)


@dataclass(slots=True)
class Classified:
    """verdict: int64[n], index into `judgements`, beside `run.faults`. calls: those with gup faults, and
    their cause."""

    facts: Facts
    run: Replayed
    past: History
    evidence: I64
    verdict: I64
    judgements: list[Judgement]
    calls: list[tuple[Call, str]]
    _counts: list[dict[str, object]] | None = None

    def of(self, row: int) -> Verdict:
        """The verdict on row `row` of `run.faults`."""
        return self.judgements[int(self.verdict[row])].verdict

    def counts(self) -> list[dict[str, object]]:
        """One row a cause, most faults first: cause, faults, pages (distinct), share, time_ns, ambiguous."""
        if self._counts is not None:
            return self._counts
        faults, out = self.run.faults, []
        by_cause: dict[str, list[int]] = {}
        for number, judgement in enumerate(self.judgements):
            by_cause.setdefault(judgement.verdict.cause, []).append(number)
        gup: dict[str, int] = {}
        for call, cause in self.calls:
            gup[cause] = gup.get(cause, 0) + call.gup
        total = len(faults) + sum(gup.values())
        page = (faults.addr >> np.uint64(12)).astype(np.int64) | (faults.mm.astype(np.int64) << 40)
        unsure = np.array([j.verdict.confidence == AMBIGUOUS for j in self.judgements] + [False], bool)
        for cause in {*by_cause, *gup}:
            mask = np.isin(self.verdict, by_cause.get(cause, []))
            number = int(mask.sum()) + gup.get(cause, 0)
            latency = faults.latency[mask]
            out.append(
                {
                    "cause": cause,
                    "faults": number,
                    "pages": _distinct(page[mask]) + gup.get(cause, 0),
                    "share": number / total if total else 0.0,
                    "time_ns": int(latency[latency > 0].sum()),
                    "ambiguous": int(unsure[self.verdict[mask]].sum()),
                }
            )
        self._counts = sorted(out, key=lambda row: (-int(str(row["faults"])), str(row["cause"])))
        return self._counts

    def shares(self, rows: list[dict[str, object]] | None = None) -> tuple[float, float]:
        """(unknown, ambiguous) as shares of all faults. rows: of `counts`, where they are at hand."""
        rows = self.counts() if rows is None else rows
        total = sum(int(str(r["faults"])) for r in rows) or 1
        unknown = sum(int(str(r["faults"])) for r in rows if r["cause"] == "unknown")
        return unknown / total, sum(int(str(r["ambiguous"])) for r in rows) / total


def _distinct(values: I64) -> int:
    # np.unique hashes, which for a million pages is several times as slow as one sort.
    return 1 + int(np.count_nonzero(np.diff(np.sort(values)))) if len(values) else 0


def classify_facts(facts: Facts, rules: tuple[Rule, ...] = RULES) -> Classified:
    """Verdicts on all faults of `facts`. `rules` is there for tests that break one on purpose."""
    run = Replay(facts).run()
    inferred = infer(facts, run)
    past = trace(facts, run)
    packed = features(facts, run, past, inferred)
    codes, verdict = np.unique(packed, return_inverse=True)
    judgements = [judge(unpack(code), rules) for code in codes.tolist()]
    calls = [(call, of_call(call.name)) for call in facts.calls if call.gup > 0]
    return Classified(facts, run, past, packed, verdict.astype(np.int64), judgements, calls)


__all__ = ["CONFIDENCES", "PREFAULT", "SLUGS", "Classified", "classify_facts"]
