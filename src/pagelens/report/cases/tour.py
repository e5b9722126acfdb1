"""The tour: the short answers, in under a minute; what `./dev demo` shows.

First a real program is recorded, then each question is run. A question that lacks something here says what,
and the tour goes on: without privilege it is shorter, never wrong.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TextIO

from pagelens.linux import probe
from pagelens.report import cases
from pagelens.report.cases.lab import Lab, completeness
from pagelens.report.cases.text import text_lines
from pagelens.vm.errors import CapabilityMissingError, PagelensError
from pagelens.vm.units import counted

BUDGET = 60.0  # seconds in all; questions that would go beyond it are named, not run
PROGRAM = """#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(void) { puts("hello"); return 0; }
"""
Say = Callable[[str], None]
TOUR = (1, 2, 11, 4, 3, 6, 7, 10)


def tour(out: TextIO) -> int:
    """Print it; 0, also where much is missing (a bug in a case is an error, and shows)."""
    began = time.monotonic()

    def left() -> float:
        return BUDGET - (time.monotonic() - began)

    def say(line: str) -> None:
        out.write(line + "\n")
        out.flush()

    with Lab() as lab:
        why_not = lab.can_record()
        soft_dirty, _ = probe.capability_status("soft-dirty")
        bits = "yes" if soft_dirty else "no (probed; the model answers)"
        root = "yes" if lab.root else "no (fewer features)"
        say(f"kernel {'.'.join(platform.release().split('.')[:2])}  root {root}  soft-dirty {bits}")
        if why_not:
            say(f"recording in the kernel (BPF): no ({why_not})")
            lab.brief = "recording by BPF does not work here, see above"
        say("")
        _program(lab, say)
        for number in TOUR:
            entry = next(e for e in cases.ENTRIES if e.number == number)
            if left() < 2 * entry.seconds + 3:
                say(
                    f"[{number}] {entry.question}   not run, to stay under {BUDGET:.0f} s: pagelens case "
                    f"{number}"
                )
                continue
            try:
                for line in text_lines(cases.run(entry, lab)):
                    say(line)
            except (PagelensError, OSError) as error:
                say(f"[{number}] {entry.question}")
                say(f"    missing {error}")
        _proof(say, left() - 2)
        say("next   pagelens case N | pagelens run -- CMD | pagelens why CAPTURE | pagelens model step")
        say(f"       ({time.monotonic() - began:.0f} s; every figure was measured just now)")
    return 0


def _program(lab: Lab, say: Say) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler:
        source = lab.path / "hello.c"
        source.write_text(PROGRAM)
        command = [compiler, "-O2", "-c", str(source), "-o", str(lab.path / "hello.o")]
        shown = "gcc -O2 -c hello.c"
    else:
        command = [sys.executable, "-c", "import json, decimal, re"]
        shown = "python3 -c 'import json, decimal, re'"
    try:
        recorded = lab.record(command, name="program", partly=True)
    except CapabilityMissingError as error:
        say(f"[0] {shown}: not recorded: {error}")
        return
    from pagelens.report import faults
    from pagelens.why import conclusions, summary_lines

    say(f"[0] Where do the faults of `{shown}` come from?")
    for line in summary_lines(conclusions(recorded.capture), most=5)[:-1]:
        say("    cause   " + line.strip())
    by = [
        r for r in faults.group(faults.load(recorded.capture), "function")[:4] if r["what"] != "? in unmapped"
    ]
    say("    code    " + ", ".join(f"{row['what']} {row['share']:.0%}" for row in by[:3]))
    how = "recorded in the kernel (BPF)"
    if recorded.capture.meta.get("method") != "bpf":
        how = (
            "recorded by perf, user mode only; causes are likely: reads and writes told by the last snapshot"
        )
    say(f"    method  {how}; {completeness(recorded.capture)}")


def _proof(say: Say, seconds: float) -> None:
    """Random programs on the model and on this kernel: as many operations as the time allows."""
    operations = 2000 if seconds > 30 else 500 if seconds > 12 else 0
    if not operations:
        say("proof  not run, to stay in time: pagelens model fuzz")
        return
    command = [sys.executable, "-m", "pagelens.cli.main", "model", "fuzz", "--seed", "1", "--no-shrink"]
    command += ["--ops", str(operations), "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        say("proof  model against this kernel: not finished here; try: pagelens model fuzz")
        return
    say(
        f"proof  model ({found['profile']}) against this kernel: {found['operations']:,} operations, "
        f"{counted(found['disagreements'], 'disagreement')}"
    )
    for difference in found["differences"][:3]:
        say(f"    differs  {difference}")
    if found["differences"]:
        say("    fences  open: " + ("; ".join(found["open_fences"]) or "none"))
