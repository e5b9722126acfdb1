"""derived/causes of a capture: seq -> cause, beside the facts and never among them.

Written once and reused as long as the facts and the rules are the same; anybody may delete it.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np

from pagelens.capture import overview
from pagelens.capture.reader import Capture
from pagelens.capture.store import encoding
from pagelens.why.agreement import agreement
from pagelens.why.classified import Classified, classify_facts
from pagelens.why.kept import DERIVED, known, state
from pagelens.why.load import lean_arrow, load
from pagelens.why.views import title


def classify(capture: Capture) -> Classified:
    """Verdicts on all faults of a capture (see `Classified`; `table()` gives them as columns)."""
    return classify_facts(load(capture))


def table(result: Classified) -> Any:
    """pyarrow.Table: seq int64, cause, confidence, page_cause (what the page needed), faults int64 (1, or
    the gup faults of a call). Sorted by seq."""
    import pyarrow as pa

    verdicts = result.judgements
    faults, calls = result.run.faults, result.calls
    index = result.verdict
    names: dict[str, list[str]] = {
        "cause": [j.verdict.cause for j in verdicts],
        "confidence": [j.verdict.confidence for j in verdicts],
        "page_cause": [j.page for j in verdicts],
    }
    gup: dict[str, list[str | None]] = {
        "cause": [cause for _, cause in calls],
        "confidence": ["certain"] * len(calls),
        "page_cause": [None] * len(calls),
    }
    seq = np.concatenate((faults.seq, np.array([c.seq for c, _ in calls], np.int64)))
    order = np.argsort(seq, kind="stable") if len(seq) else np.empty(0, np.int64)
    at = np.flatnonzero(order >= len(faults))  # the calls among them
    weight = np.ones(len(seq), np.int64)
    weight[at] = np.array([c.gup for c, _ in calls], np.int64)[order[at] - len(faults)]
    columns: dict[str, Any] = {"seq": pa.array(seq[order])}
    for name, values in names.items():
        words = sorted({*values, *(v for v in gup[name] if v is not None)})
        place = {word: i for i, word in enumerate(words)}
        lut = np.array([place[v] for v in values] or [0], np.int8)
        codes = np.empty(len(seq), np.int8)
        np.take(lut, index, out=codes[: len(faults)])
        codes[len(faults) :] = [-1 if v is None else place[v] for v in gup[name]]
        codes = codes[order]
        mask = codes < 0 if None in gup[name] else None
        columns[name] = pa.DictionaryArray.from_arrays(
            pa.array(codes, mask=mask), pa.array(words, pa.string())
        )
    columns["faults"] = pa.array(weight)
    return pa.table(columns)


def summary_fields(result: Classified) -> dict[str, Any]:
    """What `--summary-json` takes from here: causes, unknown_share, ambiguous_share, agreement; and the
    causes' titles."""
    rows = result.counts()
    unknown, ambiguous = result.shares(rows)
    keys = ("cause", "faults", "pages", "share", "time_ns")
    return {
        "causes": [{k: row[k] for k in keys} for row in rows],
        "unknown_share": unknown,
        "ambiguous_share": ambiguous,
        "agreement": agreement(result),
        "titles": {str(row["cause"]): title(str(row["cause"])) for row in rows},
    }


def derive(capture: Capture, *, again: bool = False) -> dict[str, Any]:
    """Write derived/causes unless it is there and current; returns the fields of the summary (`summary_fields`,
    and what `overview.count` gives as "overview"). OSError where the capture cannot be written."""
    fields = None if again else known(capture)
    if fields is None:
        seen = state(capture)  # before reading: a part that comes later counts as a change
        fields, verdicts = _conclude(capture)
        _write(capture, verdicts, {"state": seen, "summary": fields})
    return fields


def conclusions(capture: Capture) -> dict[str, Any]:
    """As `derive`, also of a capture that cannot be written."""
    fields = known(capture)
    if fields is None:
        seen = state(capture)  # before reading: a part that comes later counts as a change
        fields, verdicts = _conclude(capture)
        # Derived tables are a cache: where they cannot be written the next reader does this again.
        with contextlib.suppress(OSError):
            _write(capture, verdicts, {"state": seen, "summary": fields})
    return fields


def _conclude(capture: Capture) -> tuple[dict[str, Any], Any]:
    # The verdicts leave as a table alone: the replay's columns are free before anything is written.
    with lean_arrow():
        counts = overview.count(capture)
        result = classify(capture)
        return summary_fields(result) | {"overview": counts}, table(result)


def _write(capture: Capture, verdicts: Any, meta: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    directory = capture.path / DERIVED / "causes"
    directory.mkdir(parents=True, exist_ok=True)
    stamp = capture.path / DERIVED / "meta.json"
    stamp.unlink(missing_ok=True)
    aside = directory / ".part-00000000.new"
    with lean_arrow():
        pq.write_table(verdicts, aside, write_statistics=["seq"], **encoding("causes", verdicts.column_names))
    aside.replace(directory / "part-00000000.parquet")
    aside = stamp.with_name(".meta.json.new")
    aside.write_text(json.dumps(meta))
    aside.replace(stamp)
