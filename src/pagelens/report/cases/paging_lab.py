"""Case 10. The paging lab, first half: its questions, answered by this kernel where it can be asked, and by
the model that is held against it.

A scenario of the small questions (a fault's stages, brk in four steps, split and merge, copy-on-write, what a
TLB flush is owed) runs on the oracle child and in the model, step by step; a program of its own measures what
looking up a vma costs, and at how many vmas mmap fails. The course is docs/lab.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from pagelens.linux import elf, maps
from pagelens.model import op as ops
from pagelens.model.explain import access_stages
from pagelens.model.runner import ModelWorld
from pagelens.model.scenario import parse
from pagelens.report.cases.lab import Answer, Lab
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.units import counted

SCENARIO = """\
# The paging lab: the small questions
a = mmap 8 at arena[0] rw private anon fixed
read a[0]
write a[0]
write a[1:8]
brk heap[4]
write heap[0:4]
brk heap[1]+100
mprotect a[2:4] r
expect vmas 3 in a
mprotect a[2:4] rw
expect vmas 1 in a
munmap a[6]
q = fork
q: write a[1]
q: exit
write a[1]
madvise a[0:2] dontneed
"""


def run(lab: Lab) -> Answer:
    """Run it."""
    answer = Answer(
        10, "The paging lab: what happens, and what does it cost?",
        reproduce="pagelens case 10; the course: docs/lab; pagelens model grade --list",
    )  # fmt: skip
    world = ModelWorld("linux-6.18")
    answer.method = (
        "stages and flushes: the model linux-6.18; proof: a child on this kernel against the model;"
        " the rest: this kernel"
    )
    _stages(answer, world)
    _scenario(answer)
    _flushes(answer, world)
    _executable(answer)
    _vmas(answer, lab)
    answer.headline = "fault, brk, split and merge, copy-on-write, TLB, find_vma, the vma limit"
    return answer


def _stages(answer: Answer, world: ModelWorld) -> None:
    # A write of untouched memory, told in stages.
    for op in parse(SCENARIO).operations[:1]:
        world.apply(op)
    stages = list(access_stages(world.processes["main"], ops.ARENA_BASE + 4096, "write"))
    for stage in stages[2:]:
        answer.say(
            "fault", f"{stage.name:<11} {stage.text}" + (f"  [{stage.kernel}]" if stage.kernel else "")
        )
    answer.figures["stages"] = [s.name for s in stages]


def _scenario(answer: Answer) -> None:
    # The same on this kernel and in the model.
    from pagelens.proof.children import OracleError
    from pagelens.proof.probes import probe_profile
    from pagelens.proof.verify import verify

    scenario = parse(SCENARIO, "case10")
    try:
        profile = probe_profile().profile
        verdict = verify(scenario, profile)
    except (CapabilityMissingError, OracleError) as error:
        answer.complete = False
        answer.missing.append(f"the same on this kernel: {error}")
        return
    wrong = len(verdict.disagreements) + len(verdict.unmet)
    answer.say(
        "proof",
        f"{verdict.agreement.operations} operations on kernel {verdict.kernel} and in the model"
        f" ({profile.name}): {counted(wrong, 'disagreement')}",
    )
    for difference in (*verdict.disagreements, *verdict.unmet)[:3]:
        answer.say("differs", str(difference))
    if wrong:
        answer.say(
            "fences",
            "open: " + ("; ".join(f"{f.name}: {f.how}" for f in verdict.fences if not f.ok) or "none"),
        )
    answer.figures["operations"] = verdict.agreement.operations
    answer.figures["disagreements"] = wrong


def _flushes(answer: Answer, world: ModelWorld) -> None:
    # Which of the scenario's operations leave something that a processor may remember wrongly.
    owed: dict[str, int] = {}
    for op in parse(SCENARIO).operations[1:]:
        process = world.processes.get(op.proc)
        before = len(process.mm.tables.flushes) if process else 0
        world.apply(op)
        if process is not None and process.alive and len(process.mm.tables.flushes) > before:
            owed.setdefault(process.mm.tables.flushes[-1][2], 0)
            owed[process.mm.tables.flushes[-1][2]] += 1
    answer.figures["flushes"] = owed
    told = ", ".join(f"{why} {count}" for why, count in owed.items())
    answer.say("tlb", f"flushes owed: {told}; none for a first touch, for brk up, for a reused page")


def _executable(answer: Answer) -> None:
    # One program as linked (PT_LOAD), as loaded, as vmas.
    program = str(Path("/proc/self/exe").resolve())
    headers = elf.read(program, Path(program).stat().st_ino)
    if headers is None:
        return
    loads = headers.loads()
    own = [v for v in maps.parse(Path("/proc/self/maps").read_bytes()) if v.name == program]
    bss = sum(s.memsz - s.filesz for s in loads)
    relro = any(s.type == elf.PT_GNU_RELRO for s in headers.segments)
    answer.figures["executable"] = {"loads": len(loads), "vmas": len(own), "bss": bss, "relro": relro}
    split = "; relro splits the writable one once the loader is done" if relro else ""
    answer.say(
        "exec",
        f"{Path(program).name}: {len(loads)} PT_LOAD segments as linked, {len(own)} vmas of the file{split};"
        f" bss {bss:,} bytes: anonymous memory behind the last",
    )


def _vmas(answer: Answer, lab: Lab) -> None:
    try:
        program = lab.compile("paging_lab")
    except CapabilityMissingError as error:
        answer.complete = False
        answer.missing.append(f"the cost of a look-up and the vma limit: {error}")
        return
    done = subprocess.run([program, "50000"], capture_output=True, text=True, check=True).stdout
    costs: list[dict[str, Any]] = []
    for words in (line.split() for line in done.splitlines()):
        if words[0] == "cost":
            tree = max(float(words[2]) - float(words[3]), 0.0)
            costs.append({"vmas": int(words[1]), "kernel_ns": tree, "list_ns": float(words[4])})
        elif words[0] == "limit":
            answer.figures["limit"] = {
                "vmas": int(words[3]), "split": words[2], "one_more": words[4], "two_more": words[5],
            }  # fmt: skip
    answer.figures["find_vma"] = costs
    told = "; ".join(f"{c['vmas']:,}: {c['kernel_ns']:.0f} and {c['list_ns']:,.0f}" for c in costs)
    answer.say("lookup", f"ns a look-up by the kernel's tree and by a list, for n vmas: {told}")
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    limit = answer.figures["limit"]
    answer.figures["max_map_count"] = most
    answer.say(
        "limit",
        f"max_map_count {most:,}: at so many vmas a split fails ({limit['split']}), one more mmap is"
        f" {limit['one_more']}, the next fails ({limit['two_more']}): {limit['vmas']:,} vmas",
    )
