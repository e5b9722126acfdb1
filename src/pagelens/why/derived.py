"""derived/causes of a capture: seq -> cause, beside the facts and never among them.

Written once and reused as long as the facts and the rules are the same; anybody may delete it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pagelens.capture.reader import Capture
from pagelens.why.agreement import agreement
from pagelens.why.classified import Classified, classify_facts
from pagelens.why.load import load

RULES_VERSION = 1  # of what the rules conclude: raise it when a verdict changes
DERIVED = "derived"


def classify(capture: Capture) -> Classified:
    """Verdicts on all faults of a capture (see `Classified`; `table()` gives them as columns)."""
    return classify_facts(load(capture))


def table(result: Classified) -> Any:
    """pyarrow.Table: seq int64, cause, confidence, page (what the page needed), faults int64 (1, or the gup
    faults of a call). Sorted by seq."""
    import pyarrow as pa

    verdicts = result.judgements
    faults, calls = result.run.faults, result.calls
    index = result.verdict
    names: dict[str, list[str]] = {
        "cause": [j.verdict.cause for j in verdicts],
        "confidence": [j.verdict.confidence for j in verdicts],
        "page": [j.page for j in verdicts],
    }
    gup: dict[str, list[str | None]] = {
        "cause": [cause for _, cause in calls],
        "confidence": ["certain"] * len(calls),
        "page": [None] * len(calls),
    }
    seq = np.concatenate((faults.seq, np.array([c.seq for c, _ in calls], np.int64)))
    weight = np.concatenate((np.ones(len(faults), np.int64), np.array([c.gup for c, _ in calls], np.int64)))
    order = np.argsort(seq, kind="stable")
    columns: dict[str, Any] = {"seq": pa.array(seq[order])}
    for name, values in names.items():
        words = sorted({*values, *(v for v in gup[name] if v is not None)})
        place = {word: i for i, word in enumerate(words)}
        lut = np.array([place[v] for v in values] or [0], np.int32)
        codes = np.concatenate(
            (
                lut[index] if len(index) else np.empty(0, np.int32),
                np.array([-1 if v is None else place[v] for v in gup[name]], np.int32),
            )
        )[order]
        columns[name] = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(words))
    columns["faults"] = pa.array(weight[order])
    return pa.table(columns)


def summary_fields(result: Classified) -> dict[str, Any]:
    """What `--summary-json` takes from here: causes, unknown_share, agreement."""
    unknown, ambiguous = result.shares()
    keys = ("cause", "faults", "pages", "share", "time_ns")
    return {
        "causes": [{k: row[k] for k in keys} for row in result.counts()],
        "unknown_share": unknown,
        "ambiguous_share": ambiguous,
        "agreement": agreement(result),
    }


def derive(capture: Capture, *, again: bool = False) -> Path:
    """Write derived/causes unless it is there and current; returns its directory. OSError where the capture
    cannot be written."""
    directory = capture.path / DERIVED / "causes"
    stamp = capture.path / DERIVED / "meta.json"
    wanted = {"rules": RULES_VERSION, "events": [[p.name, p.stat().st_size] for p in capture.parts("events")]}
    if not again and directory.is_dir() and stamp.exists():
        try:
            if json.loads(stamp.read_text()) == wanted:
                return directory
        except ValueError:
            pass  # half-written: derive again
    write(capture, classify(capture))
    return directory


def write(capture: Capture, result: Classified) -> None:
    """Write derived/causes and its stamp, aside and renamed."""
    import pyarrow.parquet as pq

    directory = capture.path / DERIVED / "causes"
    directory.mkdir(parents=True, exist_ok=True)
    stamp = capture.path / DERIVED / "meta.json"
    stamp.unlink(missing_ok=True)
    aside = directory / ".part-00000000.new"
    pq.write_table(table(result), aside, compression="zstd", compression_level=1)
    aside.replace(directory / "part-00000000.parquet")
    events = [[p.name, p.stat().st_size] for p in capture.parts("events")]
    aside = stamp.with_name(".meta.json.new")
    aside.write_text(json.dumps({"rules": RULES_VERSION, "events": events}))
    aside.replace(stamp)
