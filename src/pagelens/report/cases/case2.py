"""Case 2: how did the kernel know that I wrote?

A page of initialised data is read, then written. Nothing walks the page tables in the background: the page
is first mapped read-only from the page cache, so the store faults, and the fault copies it. The same for
bss, where the zero page stands in for the file's page; and both once more written first.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.report.cases.subject import Subject, build
from pagelens.report.diff import Diff, Moment, compare
from pagelens.report.difftext import as_json, as_text
from pagelens.vm.regions import Kind
from pagelens.vm.units import AddrRange

QUESTION = "How did the kernel know that I wrote?"
ANSWER = (
    "By the fault of the store itself. A page that was only read is mapped read-only (the page of the page cache, or "
    "the zero page), so the first store faults with error 7 and the fault handler puts a private copy in its place: "
    "clean becomes dirty and anonymous, and Rss stays because one page replaced another. Nothing walks the page tables."
)
FIELDS = ("Rss", "Private_Clean", "Private_Dirty", "Anonymous")


def run(say: Callable[[str], None]) -> dict[str, Any]:
    """Run it here; returns case, question, answer, evidence (one row for each step) and how it was
    recorded."""
    program = build("case2")
    evidence: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pagelens-case2-") as directory:
        for name, commands in (
            ("read, then written", ["forget data", "read data", "write data", "read bss", "write bss"]),
            ("written first", ["forget data", "write data", "write bss"]),
        ):
            capture = Path(directory) / f"{len(evidence)}.plens"
            for row in _once(program, capture, commands):
                evidence.append({"run": name, **row})
    for row in evidence:
        say(f"[{row['run']}] {row['step']}: {row['symbol'] or '?'} in {row['region']}")
        changed = [f"{f} {row['fields'][f][0] // 1024}→{row['fields'][f][1] // 1024}" for f in FIELDS]
        say(f"    {'  '.join(changed)}  (KiB)")
        for fault in row["chain"]:
            when = "then" if fault["between"] else "before"
            say(f"    {when:<6} {fault['what']} at {fault['from']}  [{fault['cause']}]")
        say(f"    {row['what']}")
    say(ANSWER)
    return {"case": 2, "question": QUESTION, "answer": ANSWER, "evidence": evidence}


def _once(program: Path, capture: Path, commands: list[str]) -> list[dict[str, Any]]:
    moments: list[tuple[str, Moment]] = []
    with Subject(program, capture=capture) as subject:
        moments.append(("start", _look(subject.pid)))
        for command in commands:
            subject.tell(command)
            moments.append((command, _look(subject.pid)))
        subject.finish()
    diffs = []
    for (_, before), (step, after) in itertools.pairwise(moments):
        kind = Kind.DATA if step.endswith("data") else Kind.BSS
        region = next(r for r in after.regions if r.kind is kind and program.name in r.label)
        diffs.append((step, region.label, compare(before, after, where=AddrRange(region.start, region.end))))
    _attribute([d for _, _, d in diffs], capture)
    return [_row(step, label, diff) for step, label, diff in diffs]


def _look(pid: int) -> Moment:
    with Process.open(pid) as proc:
        shot = snapshot.take(proc)
        found, _ = regions.regions(proc, shot.vmas)
    return Moment(shot, found, f"process {pid}")


def _attribute(diffs: list[Diff], capture: Path) -> None:
    from pagelens.capture.reader import Capture
    from pagelens.report import moments, stores

    opened = Capture(capture)
    mm = moments.main_mm(opened)
    for diff in diffs:
        stores.attribute(diff, opened, mm)


def _row(step: str, label: str, diff: Diff) -> dict[str, Any]:
    value = as_json(diff)
    totals = {f: [_total(m, diff, f) for m in (diff.a, diff.b)] for f in FIELDS}
    page = value["pages"][0] if value["pages"] else {}
    return {
        "step": step,
        "region": label,
        "fields": totals,
        "pages": len(value["pages"]),
        "symbol": page.get("symbol"),
        "what": page.get("what", "no page changed"),
        "before": page.get("before", []),
        "after": page.get("after", []),
        "chain": page.get("chain", []),
        "stores": page.get("stores", []),
        "text": as_text(diff, explain=True),
    }


def _total(moment: Moment, diff: Diff, name: str) -> int:
    # The field over the vma that the diff was cut to.
    where = diff.where
    account = moment.shot.accounting
    if account is None or where is None or name not in account.fields:
        return 0
    column = account.column(name)
    return sum(
        int(column[i]) for i, v in enumerate(moment.shot.vmas) if v.start < where.end and v.end > where.start
    )
