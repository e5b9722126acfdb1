"""Case 1. The thread that dirtied 100 MB: what a new thread's stack does to the vma beside it."""

from __future__ import annotations

from pagelens.linux import probe
from pagelens.linux import snapshot as live
from pagelens.model import Machine
from pagelens.report.cases.lab import Answer, Lab, completeness
from pagelens.vm.pages import PageState
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.vma import Vma

MB = 100
STACK = 8 << 20


def run(lab: Lab) -> Answer:
    """Run it."""
    answer = Answer(1, "Does creating a thread dirty 100 MB?")
    recorded = not lab.can_record()
    soft_dirty, why_not = probe.capability_status("soft-dirty")
    stepped = lab.start([lab.compile("thread_dirty"), str(MB)], recorded="thread_dirty" if recorded else "")
    dirty: dict[str, int] = {}
    shots: dict[str, Snapshot] = {}
    for stage in ("filled", "thread1", "written1", "thread2", "written2"):
        said = stepped.until(stage)
        pid, base, size = int(said["pid"]), int(said["malloc"], 16), int(said["size"], 16)
        shots[stage] = live.take(pid, pages=soft_dirty, accounting=True)
        pages = shots[stage].pages
        if soft_dirty and pages is not None:
            dirty[stage] = pages.clipped(base & ~0xFFF, base + size).count_where(PageState.SOFT_DIRTY)
            if stage in ("filled", "written1"):
                with open(f"/proc/{pid}/clear_refs", "w") as stream:
                    stream.write("4")
        if stage != "written2":
            stepped.go()
    stepped.finish()
    big = shots["thread1"].vmas.find(base + size // 2)
    stack = shots["thread1"].vmas.find(int(stepped.said["stack1"], 16))
    assert big is not None and stack is not None
    merged = big == stack
    kernel = live_kernel()
    answer.headline = f"here, kernel {kernel}: " + ("yes, by a merge" if merged else "no")
    answer.say("here", _line(stack, "stack of thread 1" + (" and malloc 100 MB, one vma" if merged else "")))
    if not merged:
        differ = sorted((stack.vm_flags or frozenset()) ^ (big.vm_flags or frozenset()))
        beside = "adjacent" if stack.end == big.start or big.end == stack.start else "apart"
        flags = f"flags differ: {' '.join(differ)}" if differ else "rights or owner differ"
        answer.say("here", _line(big, f"malloc {MB} MB; {beside}, not merged ({flags})"))
    answer.figures = {"merged": merged, "kernel": kernel, "soft_dirty": dirty}
    if dirty:
        told = ", ".join(f"{stage} {count:,}" for stage, count in dirty.items())
        answer.say("here", f"soft-dirty pages of the malloc (cleared after filled and written1): {told}")
    else:
        answer.missing.append(f"soft-dirty bits of this kernel: {why_not}")
    if recorded:
        count, calls = _faults(lab, stepped.times, base, size)
        answer.figures["faults_of_thread"] = count
        answer.say(
            "faults", f"{count:,} in the malloc while the threads were made: a thread touches no page of it"
        )
        answer.say("calls", "; ".join(calls))
        answer.method = "vmas with flags at each stage; faults recorded: " + completeness(
            lab.capture("thread_dirty")
        )
    else:
        answer.complete = False
        answer.missing.append(f"the faults and calls: {lab.can_record()}")
        answer.method = "vmas with flags at each stage"
    for profile in ("linux-6.1", "linux-6.12"):
        marked, one, faults = model(profile)
        answer.figures[profile] = {"soft_dirty_pages": marked, "one_vma": one, "faults": faults}
        how = "merged with the stack" if one else "not merged"
        answer.say(
            profile.removeprefix("linux-"),
            f"{how}: {marked:,} pages soft-dirty, {faults} faults, 0 written  (model {profile})",
        )
    answer.say(
        "why",
        "6.1: mmap(STACK) + mprotect -> same flags as the malloc beside it -> merge -> the whole vma "
        "counts as "
        "dirty; since 6.7 MAP_STACK sets VM_NOHUGEPAGE, the flags differ, nothing merges",
    )
    answer.reproduce = "pagelens case 1; on 6.1: ./dev in-kernel 6.1 -- pagelens case 1"
    return answer


def live_kernel() -> str:
    """Release, the first two numbers."""
    import platform

    return ".".join(platform.release().split(".")[:2])


def _line(vma: Vma, text: str) -> str:
    flags = " nohugepage" if vma.vm_flags and "nh" in vma.vm_flags else ""
    return f"{vma.start:012x}-{vma.end:012x} {vma.perms}{flags}  {text}"


def _faults(lab: Lab, times: dict[str, int], base: int, size: int) -> tuple[int, list[str]]:
    from pagelens.why.explain import call_row
    from pagelens.why.load import load

    facts = load(lab.capture("thread_dirty"))
    f = facts.faults
    count = 0
    for before, after in (("filled", "thread1"), ("written1", "thread2")):
        inside = (f.time > times[before]) & (f.time <= times[after])
        count += int((inside & (f.addr >= base) & (f.addr < base + size)).sum())
    shaping = [
        call_row(c, "")["what"].split(" = ")[0]
        for c in facts.calls
        if times["filled"] < c.start <= times["thread1"] and c.name in ("mmap", "mprotect", "clone3", "clone")
    ]
    return count, shaping[:6]


def model(profile: str) -> tuple[int, bool, int]:
    """(soft-dirty pages of the malloc after the thread, whether one vma holds both, faults) in the model."""
    machine = Machine(profile)
    process = machine.spawn()
    length = (MB << 20) + 0x1000
    big = process.mmap(0, length, 3, 0x22)
    process.access(big, length, "w")
    process.clear_refs(4)
    before = process.min_flt
    stack = process.mmap(0, STACK + 0x1000, 0, 0x20022)
    process.mprotect(stack + 0x1000, STACK, 3)
    snap = process.snapshot()
    assert snap.pages is not None
    marked = snap.pages.clipped(big, big + length).count_where(PageState.SOFT_DIRTY)
    vma = snap.vmas.find(big)
    assert vma is not None
    return marked, vma.start <= stack + 0x1000 < vma.end, process.min_flt - before
