"""Case 7. Write-protect everything: which pages a program writes, from the recording and from the tracker."""

from __future__ import annotations

import numpy as np

from pagelens.report.cases.lab import Answer, Lab, completeness


def run(lab: Lab) -> Answer:
    """Run it."""
    answer = Answer(
        7, "Which pages does a program write?", reproduce="pagelens case 7; pagelens dirty -- CMD"
    )
    why_not = lab.can_record()
    if why_not:
        answer.complete = False
        answer.missing.append(f"recording: {why_not}; without it: pagelens dirty PID")
        return answer
    from pagelens.why import classify

    recorded = lab.record([lab.compile("every_write")], name="every_write")
    said = dict(w.split("=", 1) for w in recorded.stdout.split())
    result = classify(recorded.capture)
    faults = result.run.faults
    wrote = ~faults.failed & (faults.error >= 0) & ((faults.error & 2) != 0)
    page = np.unique(faults.addr[wrote] >> np.uint64(12))
    at, later = int(said["first"], 16) >> 12, int(said["last"], 16) >> 12
    mine = int(((page >= at) & (page < at + 400)).sum()) + int(((page >= later) & (page < later + 50)).sum())
    kernel = int((wrote & ~faults.user & (faults.addr >> np.uint64(12) >= at)).sum())
    answer.headline = f"{len(page):,} pages in its life"
    answer.figures = {"said": int(said["written"]), "seen": mine, "all": len(page)}
    answer.say(
        "asked", f"it says that it wrote {said['written']} pages of two mappings; the recording has {mine}"
    )
    answer.say(
        "which",
        f"{len(page):,} pages in all, with loader, libraries and stack; {kernel} faults by the kernel",
    )
    for row in [r for r in result.counts() if r["cause"] not in ("file-page-cached", "first-read")][:5]:
        answer.say("cause", f"{row['faults']:>6,}  {row['cause']}")
    answer.method = "a page's first write is a fault; " + completeness(recorded.capture)
    answer.say(
        "note",
        "later writes to the same page do not fault: `pagelens dirty` re-arms the protection by epochs",
    )
    return answer
