"""Case 2. How did the kernel know that I wrote? The smaps fields, the page, the store, and its fault."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagelens.linux import snapshot as live
from pagelens.report.cases.lab import Answer, Lab, Stepped, completeness
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.snapshot import Snapshot

FIELDS = ("Rss", "Private_Clean", "Private_Dirty", "Anonymous")
STAGES = ("start", "direct", "read", "written", "blank-read", "blank-written")


def run(lab: Lab) -> Answer:
    """Run it."""
    answer = Answer(2, "How did the kernel know that I wrote?")
    program = lab.compile("who_wrote", "-O0")
    recorded = not lab.can_record()
    stepped = lab.start([program], recorded="who_wrote" if recorded else "")
    fields = _walk(stepped)
    where = {k: int(v, 16) for k, v in stepped.said.items() if k != "pid"}
    answer.headline = "page1, who_wrote.c"
    for before, after, word in (
        ("direct", "read", "read"),
        ("read", "written", "write after it"),
        ("start", "direct", "another, written at once"),
    ):
        a, b = fields[before]["data"], fields[after]["data"]
        answer.say("smaps", f"{word:<25}" + "  ".join(_change(f, a[f], b[f]) for f in FIELDS))
        answer.figures[after] = {f: [a[f] >> 10, b[f] >> 10] for f in FIELDS}
    a, b, c = (fields[s]["bss"] for s in ("written", "blank-read", "blank-written"))
    answer.say("bss", f"{'read':<25}" + "  ".join(_change(f, a[f], b[f]) for f in ("Rss", "Anonymous")))
    answer.say(
        "bss", f"{'write over it':<25}" + "  ".join(_change(f, b[f], c[f]) for f in ("Rss", "Anonymous"))
    )
    answer.figures["blank-read"] = {f: [a[f] >> 10, b[f] >> 10] for f in FIELDS}
    answer.figures["blank-written"] = {f: [b[f] >> 10, c[f] >> 10] for f in FIELDS}
    answer.method = "smaps before and after each step, the program waiting"
    if recorded:
        _faults(lab, answer, where)
    else:
        answer.complete = False
        answer.missing.append(f"the faults themselves: {lab.can_record()}")
    answer.say(
        "why",
        "each change has its fault: nothing walks the tables in the background; Rss stays because the copy "
        "replaces the file's page",
    )
    answer.reproduce = "pagelens case 2"
    return answer


def _walk(stepped: Stepped) -> dict[str, dict[str, dict[str, int]]]:
    out = {}
    for stage in STAGES:
        said = stepped.until(stage)
        snap = live.take(int(said["pid"]), pages=False)
        out[stage] = {
            "data": _fields(snap, int(said["page1"], 16)),
            "bss": _fields(snap, int(said["blank1"], 16)),
        }
        stepped.go()
    if stepped.finish():
        raise CapabilityMissingError("the subject program failed", capability="run")
    return out


def _fields(snap: Snapshot, addr: int) -> dict[str, int]:
    index = int(snap.vmas.find_many(np.array([addr], np.uint64))[0])
    account = snap.accounting
    if account is None or index < 0:
        raise CapabilityMissingError("smaps cannot be read", capability="smaps")
    return {f: int(account.column(f)[index]) for f in FIELDS}


def _change(name: str, before: int, after: int) -> str:
    if before == after:
        return f"{name} {before >> 10}={after >> 10}"
    return f"{name} {before >> 10}->{after >> 10}"


def _faults(lab: Lab, answer: Answer, where: dict[str, int]) -> None:
    from pagelens.report import faults as attributed
    from pagelens.why import classify
    from pagelens.why.explain import Explainer

    capture = lab.capture("who_wrote")
    result = classify(capture)
    explain = Explainer(result)
    table = attributed.load(capture)
    index, found = attributed.places(table, table.columns["pid"], table.ip_area, table.columns["ip"])
    row_of = {seq: i for i, seq in enumerate(table.columns["seq"].tolist())}
    for name, words in (("page1", "data"), ("page2", "data"), ("blank1", "bss")):
        story = []
        for row in explain.on_page(where[name], None):
            event = explain.fault(row)
            at = row_of.get(event["seq"])
            place = found[int(index[at])] if at is not None else None
            line = f"{place.file.rsplit('/', 1)[-1]}:{place.line}" if place and place.line else "?"
            story.append(f"{event['cause']} at {line} (error {event['error_code']})")
            answer.evidence.append(event | {"line": line, "page": name})
        mapped = _around(result, where[name])
        if mapped is not None:
            event = explain.fault(mapped)
            answer.evidence.append(event | {"line": "", "page": f"{name}, by fault-around"})
            story.insert(0, f"mapped read-only around the fault at {event['what'].split()[-1]}")
        answer.say("fault", f"{name} ({words}): " + ", then ".join(story or ["none"]))
        answer.figures[name] = [e["cause"] for e in answer.evidence if e["page"] == name]
        answer.figures[f"{name}_lines"] = [e["line"] for e in answer.evidence if e["page"] == name]
    answer.method += "; faults recorded: " + completeness(capture)
    _agreed(answer, result)


def _around(result: Any, addr: int) -> int | None:
    """The read fault that mapped the page together with its own, if the page's first fault found it
    present.
    """
    faults = result.run.faults
    here = np.flatnonzero(((faults.addr >> np.uint64(12)) == np.uint64(addr >> 12)) & ~faults.failed)
    if not len(here):
        return None
    first = int(here[np.argmin(faults.time[here])])
    if not faults.error[first] & 1 or addr >> 16 == 0:
        return None
    window = (faults.addr >> np.uint64(16)) == np.uint64(addr >> 16)
    reads = np.flatnonzero(
        window & ((faults.error & 3) == 0) & ~faults.failed & (faults.time < faults.time[first])
    )
    return int(reads[-1]) if len(reads) else None


def _agreed(answer: Answer, result: Any) -> None:
    unknown, _ = result.shares()
    answer.figures["unknown_share"] = unknown
