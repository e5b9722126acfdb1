"""The system calls that turn the present vma list of a process back into the saved one.

Pure: two vma lists in, a list of steps out; refusals come out as texts, before anything is done. A segment
(between any two borders of either list) that is mapped alike in both stays; one that is mapped otherwise is
unmapped and mapped anew, and its contents are written afterwards, so a moved mapping needs no mremap.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pagelens.vm.vma import Vma, VmaList

MADVISE_OF = {  # VmFlags letter -> (advice that sets it, advice that clears it)
    "hg": (14, 15),  # HUGEPAGE; NOHUGEPAGE
    "nh": (15, 14),
    "dc": (10, 11),  # DONTFORK, DOFORK
    "dd": (16, 17),  # DONTDUMP, DODUMP
    "wf": (18, 19),  # WIPEONFORK, KEEPONFORK
    "mg": (12, 13),  # MERGEABLE, UNMERGEABLE
    "sr": (2, 0),  # SEQUENTIAL, NORMAL
    "rr": (1, 0),  # RANDOM
}
_THP = frozenset(("hg", "nh"))
_FIXED_NAMES = ("[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[uprobes]")


@dataclass(frozen=True, slots=True)
class Step:
    """op: unmap, map, protect, advise, lock, unlock, brk. vma: for map, the saved one cut to [start, end)."""

    op: str
    start: int
    end: int
    vma: Vma | None = None
    value: int = 0


def steps(saved: VmaList, present: VmaList, start_brk: int) -> tuple[list[Step], list[str]]:
    """(steps in order, reasons why it cannot be done)."""
    out: list[Step] = []
    refused: list[str] = []
    heap_then, heap_now = _heap(saved, start_brk), _heap(present, start_brk)
    if heap_then != heap_now:
        out.append(Step("brk", heap_then, heap_then))
        present = _after_brk(present, heap_then, heap_now)
    borders = sorted(
        {*saved.starts.tolist(), *saved.ends.tolist(), *present.starts.tolist(), *present.ends.tolist()}
    )
    for start, end in pairwise(borders):
        then, now = saved.find(start), present.find(start)
        if then is None and now is None:
            continue
        if then is None and now is not None:
            if now.name in _FIXED_NAMES[1:]:
                refused.append(f"{now.name} appeared at {start:#x}")
            _join(out, Step("unmap", start, end))
            continue
        assert then is not None
        if now is None or _backing(then) != _backing(now) or _sticky(then, now):
            if then.name in _FIXED_NAMES or (now is not None and now.name in _FIXED_NAMES):
                refused.append(
                    f"{then.name or (now and now.name)} moved or was unmapped; only the kernel makes it"
                )
            elif then.vm_flags is not None and then.vm_flags & {"ht", "io", "pf"}:
                refused.append(f"{then} is of hugetlb or device memory and was unmapped")
            if now is not None:
                _join(out, Step("unmap", start, end))
            _join(out, Step("map", start, end, _cut(then, start, end)))
            out += _flag_steps(then, None, start, end)
            continue
        if then.prot != now.prot:
            _join(out, Step("protect", start, end, None, int(then.prot)))
        out += _flag_steps(then, now, start, end)
    return out, refused


def _sticky(then: Vma, now: Vma) -> bool:
    # Once a vma has hg or nh, no madvise takes both away: only a new mapping is without.
    if then.vm_flags is None or now.vm_flags is None or then.name in _FIXED_NAMES or then.shared:
        return False
    return bool(now.vm_flags & _THP) and not then.vm_flags & _THP


def _heap(vmas: VmaList, start_brk: int) -> int:
    # Where the program break is, to the page: the end of the run of vmas that begins at start_brk's page.
    end = start_brk
    for vma in vmas:
        if vma.name == "[heap]" and vma.end > end:
            end = vma.end
    return end


def _after_brk(present: VmaList, then: int, now: int) -> VmaList:
    if then < now:  # brk unmaps the rest
        kept = []
        for vma in present:
            if vma.start >= then and vma.end <= now and vma.name == "[heap]":
                continue
            kept.append(
                vma.replaced(end=then) if vma.start < then < vma.end and vma.name == "[heap]" else vma
            )
        return VmaList(kept)
    last = next((v for v in reversed(present) if v.name == "[heap]" and v.end == now), None)
    if last is None:
        return present
    return VmaList([v.replaced(end=then) if v is last else v for v in present])


def _backing(vma: Vma) -> tuple[object, ...]:
    name = vma.name if vma.name in _FIXED_NAMES else ""
    if vma.inode:
        return (vma.shared, vma.dev, vma.inode, vma.offset - vma.start, name)
    return (vma.shared, "", 0, 0, name)


def _cut(vma: Vma, start: int, end: int) -> Vma:
    offset = vma.offset + start - vma.start if vma.inode else vma.offset
    return vma.replaced(start=start, end=end, offset=offset)


def _flag_steps(then: Vma, now: Vma | None, start: int, end: int) -> list[Step]:
    if then.vm_flags is None or (now is not None and now.vm_flags is None):
        return []
    had = now.vm_flags if now is not None and now.vm_flags is not None else frozenset()
    out = []
    for letter, (on, off) in MADVISE_OF.items():
        if letter in then.vm_flags and letter not in had:
            out.append(Step("advise", start, end, None, on))
        elif letter in had and letter not in then.vm_flags and letter not in _THP:
            out.append(Step("advise", start, end, None, off))
    if "lo" in then.vm_flags and "lo" not in had:
        out.append(Step("lock", start, end))
    elif "lo" in had and "lo" not in then.vm_flags:
        out.append(Step("unlock", start, end))
    return out


def _join(out: list[Step], step: Step) -> None:
    # A step that continues the one before becomes one call with it.
    last = out[-1] if out else None
    if last is not None and last.op == step.op and last.end == step.start and last.value == step.value:
        if step.vma is None or last.vma is None:
            out[-1] = Step(step.op, last.start, step.end, None, step.value)
            return
        if _backing(last.vma) == _backing(step.vma) and last.vma.prot == step.vma.prot:
            out[-1] = Step(step.op, last.start, step.end, last.vma.replaced(end=step.end))
            return
    out.append(step)
