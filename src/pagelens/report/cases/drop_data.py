"""Case 6. Keep the range, drop the data: what each way leaves behind, and what a later read sees."""

from __future__ import annotations

import subprocess

from pagelens.report.cases.lab import Answer, Lab

WORDS = {
    "MADV_DONTNEED": "gone at once; the range stays",
    "MADV_FREE": "marked: the kernel may take them under pressure, a write keeps them",
    "MADV_COLD": "first in line for reclaim, still there",
    "MADV_PAGEOUT": "reclaimed now if there is swap, else kept",
    "MAP_NORESERVE": "says nothing of pages: only of the promise of memory",
    "mmap-over": "a new mapping in the same place",
    "munmap": "range and data gone",
}


def run(lab: Lab) -> Answer:
    """Run it."""
    answer = Answer(6, "Keep the range, drop the data?", reproduce="pagelens case 6")
    out = subprocess.run([lab.compile("drop_data")], capture_output=True, text=True, check=True).stdout
    ways = {}
    for line in out.splitlines():
        words = line.split()
        if words[0] == "way":
            ways[words[1]] = {
                "present_before": int(words[2]),
                "present_after": int(words[3]),
                "reads": words[4],
                "faults": int(words[5]),
            }
    for name, text in WORDS.items():
        way = ways[name]
        answer.say(
            "way",
            f"{name:<14} present {way['present_before']:>3} -> {way['present_after']:>3}  then reads "
            f"{way['reads']:<8} {way['faults']:>3} faults   {text}",
        )
    answer.figures = ways
    answer.headline = "64 pages, written, then given away"
    answer.method = (
        "pagemap before and after each call; the pages read again, faults from ru_minflt + ru_majflt"
    )
    return answer
