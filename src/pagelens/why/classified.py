"""Classify: the cause of every fault of a capture, in columns.

The distinct evidences (a few dozen) are judged by the rules; faults get their verdict by index. Calls that
took faults by get_user_pages get a row too, weighted with their number, so that the shares add up to what
the kernel counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

I64 = npt.NDArray[np.signedinteger[Any]]  # as many bits as needed

CONFIDENCES = (CERTAIN, LIKELY, AMBIGUOUS, UNKNOWN)


@dataclass(slots=True)
class Classified:
    """verdict: int[n], index into `judgements`, beside `run.faults`. calls: those with gup faults, and
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
        unsure = np.array([j.verdict.confidence == AMBIGUOUS for j in self.judgements], bool)
        each = np.bincount(self.verdict, minlength=len(self.judgements))
        spent = np.bincount(self.verdict, np.maximum(faults.latency, 0), minlength=len(self.judgements))
        pages = self._pages(by_cause)
        for cause in {*by_cause, *gup}:
            mine = by_cause.get(cause, [])
            number = int(each[mine].sum()) + gup.get(cause, 0)
            out.append(
                {
                    "cause": cause,
                    "faults": number,
                    "pages": pages.get(cause, 0) + gup.get(cause, 0),
                    "share": number / total if total else 0.0,
                    "time_ns": int(spent[mine].sum()),
                    "ambiguous": int(each[mine][unsure[mine]].sum()),
                }
            )
        self._counts = sorted(out, key=lambda row: (-int(str(row["faults"])), str(row["cause"])))
        return self._counts

    def _pages(self, by_cause: dict[str, list[int]]) -> dict[str, int]:
        # Distinct pages of each cause.
        faults = self.run.faults
        number = np.zeros(len(self.judgements) or 1, np.int8)  # of the cause of each verdict
        for i, verdicts in enumerate(by_cause.values()):
            number[verdicts] = i
        cause = np.take(number, self.verdict)
        page = (faults.addr >> np.uint64(12)).view(np.int64)
        if len(self.run.spaces) > 1:
            page |= faults.mm.astype(np.int64) << 40
        return {slug: _distinct(page[cause == i]) for i, slug in enumerate(by_cause)}

    def shares(self, rows: list[dict[str, object]] | None = None) -> tuple[float, float]:
        """(unknown, ambiguous) as shares of all faults. rows: of `counts`, where they are at hand."""
        rows = self.counts() if rows is None else rows
        total = sum(int(str(r["faults"])) for r in rows) or 1
        unknown = sum(int(str(r["faults"])) for r in rows if r["cause"] == "unknown")
        return unknown / total, sum(int(str(r["ambiguous"])) for r in rows) / total


def _distinct(values: I64) -> int:
    # np.unique hashes, which for a million pages is several times as slow as one sort; where they were touched in their
    # order, nearly, the sort that makes use of it is ten times as fast as the other one.
    if not len(values):
        return 0
    turns = int(np.count_nonzero(values[1:] < values[:-1]))
    if turns:
        values = np.sort(values, kind="stable" if turns * 64 < len(values) else None)
    return 1 + int(np.count_nonzero(values[1:] != values[:-1]))


def _numbered(codes: I64) -> tuple[list[int], I64]:
    """(the distinct codes, the index of each row's), in order of first appearance.

    By hashing: few of a million are distinct, and np.unique sorts them all."""
    import pyarrow as pa

    found = pa.array(codes).dictionary_encode()
    return found.dictionary.to_pylist(), found.indices.to_numpy(zero_copy_only=False)


def classify_facts(facts: Facts, rules: tuple[Rule, ...] = RULES) -> Classified:
    """Verdicts on all faults of `facts`. `rules` is there for tests that break one on purpose."""
    run = Replay(facts).run()
    inferred = infer(facts, run)
    past = trace(facts, run)
    packed = features(facts, run, past, inferred)
    codes, verdict = _numbered(packed)
    judgements = [judge(unpack(code), rules) for code in codes]
    calls = [(call, of_call(call.name)) for call in facts.calls if call.gup > 0]
    return Classified(facts, run, past, packed, verdict, judgements, calls)


__all__ = ["CONFIDENCES", "PREFAULT", "SLUGS", "Classified", "classify_facts"]
