"""Case 3. Present, yet kpagecount is 0: every such page of a process, named."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from pagelens.linux import snapshot as live
from pagelens.report.cases.lab import Answer, Lab
from pagelens.vm.errors import CapabilityMissingError
from pagelens.vm.pages import PageState

SUBJECT = """
import mmap, time
m = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
x = sum(m[i * 4096] for i in range(64))
now = time.time()
print(f"pid={__import__('os').getpid()}"); print("stage ready", flush=True); input()
"""


def run(lab: Lab) -> Answer:
    """Run it."""
    import sys

    answer = Answer(3, "Present, yet kpagecount is 0?", reproduce="pagelens case 3")
    if os.geteuid():
        answer.complete = False
        answer.missing.append("frame numbers and kpagecount need root (CAP_SYS_ADMIN)")
        answer.say(
            "model", "the zero page (64 of 64 pages that were only read) and the vdso's data pages count 0"
        )
        return answer
    stepped = lab.start([sys.executable, "-S", "-c", SUBJECT])
    said = stepped.until("ready")
    snap = live.take(int(said["pid"]), frames=True)
    stepped.go()
    stepped.finish()
    pages = snap.pages
    if pages is None or pages.mapcount is None:
        raise CapabilityMissingError("kpagecount cannot be read", capability="kpagecount")
    addr, state = pages.addresses(), pages.states()
    present = (state & np.uint32(PageState.PRESENT)) != 0
    zero = present & (pages.mapcount == 0)
    vma = snap.vmas.find_many(addr[zero])
    kinds: Counter[str] = Counter()
    flags = pages.kflags[zero] if pages.kflags is not None else np.zeros(int(zero.sum()), np.uint64)
    for index, one, flag in zip(vma.tolist(), state[zero].tolist(), flags.tolist(), strict=True):
        name = snap.vmas[index].name if index >= 0 else "?"
        if one & PageState.ZERO or flag & (1 << 24):
            kinds["the zero page (read, never written)"] += 1
        elif name.startswith(("[vvar", "[vdso")):
            kinds[f"{name}: the kernel's own page, no anonymous or file mapping counts it"] += 1
        else:
            kinds[f"{name or 'anonymous'}: not explained"] += 1
    answer.headline = f"{int(zero.sum())} of {int(present.sum()):,} present pages"
    answer.figures = {"present": int(present.sum()), "count_zero": int(zero.sum()), "kinds": dict(kinds)}
    for text, count in kinds.most_common():
        answer.say("page", f"{count:>4}  {text}")
    answer.method = "pagemap, kpagecount, kpageflags of one process at rest"
    answer.complete = snap.complete
    return answer
