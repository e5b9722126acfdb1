"""Case 3: present, yet kpagecount is 0. Each such page of a process, named, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagelens.inspect import uncounted
from pagelens.linux import probe, regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.report.cases.subject import Subject, build
from pagelens.vm.pages import PageRuns

QUESTION = "A page is present in pagemap, yet kpagecount says 0. Why?"
ANSWER = (
    "kpagecount counts reverse mappings, and some entries have none on purpose: the zero page and the huge zero page "
    "(read, never written), and bare frame numbers in mixed mappings. None of them is in Rss either: smaps asks the "
    "same question (vm_normal_page). Whole vmas of frame numbers (VM_PFNMAP: vvar on many kernels, perf's ring, device "
    "memory) never get that far: the page-table walk skips them, so pagemap shows nothing there."
)


def run(say: Callable[[str], None]) -> dict[str, Any]:
    """Run it here. CapabilityMissingError without frame numbers (root)."""
    for capability in ("pfn", "kpagecount", "kpageflags"):
        probe.require(capability, "case 3")
    with Subject(build("case3")) as subject:
        addresses = [int(word, 16) for word in subject.tell("where").split()]
        with Process.open(subject.pid) as proc:
            shot = snapshot.take(proc, frames=True)
            found, _ = regions.regions(proc, shot.vmas)
    rows = uncounted.find(shot, found)
    with_count, without = uncounted.counted(shot.pages or PageRuns.empty())
    for row in rows:
        say(
            f"{row.start:012x} {row.pages:>4} page{'s' if row.pages > 1 else ' '} {row.reason:<24} {row.region}"
        )
        say(f"    {row.why}  ({row.evidence})")
    hidden = uncounted.hidden(shot, found)
    for region in hidden:
        say(f"{region.start:012x} {region.pages:>4} pages not shown by pagemap (VM_PFNMAP)  {region.label}")
    unknown = sum(not r.known for r in rows)
    say(f"{with_count:,} present pages have a count, {without:,} have none; {unknown} unexplained")
    say(ANSWER)
    names = ("zero", "huge_zero", "ring", "written", "text")
    return {
        "case": 3,
        "question": QUESTION,
        "answer": ANSWER,
        "counted": with_count,
        "uncounted": without,
        "unexplained": unknown,
        "hidden": [{"start": f"{r.start:#x}", "pages": r.pages, "region": r.label} for r in hidden],
        "addresses": dict(zip(names, (f"{a:#x}" for a in addresses), strict=True)),
        "evidence": [
            {"start": f"{r.start:#x}", "pages": r.pages, "region": r.region, "reason": r.reason, "why": r.why,
             "known": r.known, "evidence": r.evidence}
            for r in rows
        ],
    }  # fmt: skip
