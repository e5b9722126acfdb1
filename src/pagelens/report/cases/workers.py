"""Case 11. The workers that copied their parent: who, how much, from which function, and what helps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np

from pagelens.capture.reader import Capture
from pagelens.report.cases.lab import SUBJECTS, Answer, Lab, completeness

OBJECTS = 250_000  # about 35 MB; KERNEL_FACTS measured 175 MB, the shares are the same
WORDS = {
    "read": "only reads the objects",
    "read+freeze": "the same after gc.freeze()",
    "collect": "runs the collector",
    "collect+freeze": "the same after gc.freeze()",
    "array": "reads the numbers from an array",
}


def run(lab: Lab, objects: int = OBJECTS) -> Answer:
    """Run it."""
    answer = Answer(11, "Who copied the parent?")
    command = [sys.executable, "-S", "-E", str(SUBJECTS / "workers.py"), str(objects)]
    why_not = lab.can_record()
    if why_not:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        recorded = lab.record(command, name="workers")
        out = recorded.stdout
    lines = [line.split() for line in out.splitlines()]
    parent = next(int(w[1]) for w in lines if w[0] == "parent")
    workers = {
        w[1]: {"pid": int(w[2]), "dirty_kb": int(w[3]), "faults": int(w[4])}
        for w in lines
        if w[0] == "worker"
    }
    answer.headline = f"{parent / 1024:.0f} MB parent, Python {sys.version_info[0]}.{sys.version_info[1]}"
    answer.figures = {"parent_kb": parent, "workers": workers}
    if why_not:
        answer.complete = False
        answer.missing.append(f"functions and causes of the faults: {why_not}")
        for name, text in WORDS.items():
            one = workers[name]
            answer.say(
                "worker", f"{text:<34} {one['dirty_kb'] / 1024:6.1f} MB copied, {one['faults']:,} faults"
            )
        answer.method = "each worker's own Private_Dirty and min_flt"
    else:
        _attribute(recorded.capture, workers)
        for name, text in WORDS.items():
            one = workers[name]
            top = f"; {one['top']} of them in {one['function']}" if one["copied"] >= 100 else ""
            answer.say(
                "worker", f"{text:<34} {one['copied'] / 256:6.1f} MB copied, {one['copied']:,} faults{top}"
            )
        answer.method = "causes of recorded faults; " + completeness(recorded.capture)
    answer.say("why", _verdict(workers))
    answer.reproduce = f"pagelens run -c w.plens -- python3 workers.py {objects}; pagelens why w.plens"
    return answer


def _verdict(workers: dict[str, dict[str, Any]]) -> str:
    size = {name: one.get("copied", one["dirty_kb"] // 4) for name, one in workers.items()}
    some = max(size["read"] // 10, 1)
    words = (
        ["reading an object changes its reference count: the page is copied"] if size["read"] > 100 else []
    )
    words.append("gc.freeze " + ("does not help readers" if size["read+freeze"] > some else "helps readers"))
    helps = size["collect+freeze"] * 5 < size["collect"]
    words.append("and " + ("does help the collector" if helps else "does not help the collector"))
    if size["array"] <= some:
        words.append("an array has no counts to change")
    return "; ".join(words)


def _attribute(capture: Capture, workers: dict[str, dict[str, Any]]) -> None:
    from pagelens.report import faults as attributed
    from pagelens.why import classify

    result = classify(capture)
    copies = [i for i, j in enumerate(result.judgements) if "fork-cow-child" in (j.verdict.cause, j.page)]
    seqs = result.run.faults.seq[np.isin(result.verdict, copies)]
    table = attributed.load(capture)
    pid, seq = table.columns["pid"], table.columns["seq"]
    index, found = attributed.places(table, pid, table.ip_area, table.columns["ip"])
    copied = np.isin(seq, seqs)
    for one in workers.values():
        rows = np.flatnonzero(copied & (pid == one["pid"]))
        one["copied"] = len(rows)
        numbers, counts = np.unique(index[rows], return_counts=True)
        by_function: dict[str, int] = {}
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            name = found[number].function or "a function without a name"
            by_function[name] = by_function.get(name, 0) + count
        ranked = sorted(by_function.items(), key=lambda item: -item[1])
        one["functions"] = dict(ranked[:5])
        if ranked:
            one["function"], one["top"] = ranked[0][0], f"{ranked[0][1]:,}"
