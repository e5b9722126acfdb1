"""The grader: right solutions pass, and a solution with one mistake is caught, with the operation named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagelens.lab.exercises import EXERCISES
from pagelens.lab.grade import Grader, Report
from pagelens.model.profile import get_profile
from pagelens.proof.probes import probe_profile
from support.machine import HERE

SOLUTIONS = Path(__file__).parent / "solutions"


def solution(exercise: str) -> Path:
    return SOLUTIONS / f"{exercise.replace('-', '_')}.py"


def graded(exercise: str, path: Path, programs: int, profile: str = "linux-6.18") -> Report:
    return Grader(EXERCISES[exercise], get_profile(profile)).grade(path, 5, programs)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_right_solution_passes_against_this_kernel(exercise: str) -> None:
    profile = probe_profile(machine=HERE).profile
    report = Grader(EXERCISES[exercise], profile, HERE).grade(solution(exercise), programs=3)
    assert report.failure is None, report.failure.text()
    assert (report.disputed, report.notes) == (0, [])
    assert report.graded >= 10


@pytest.mark.parametrize("profile", ["linux-6.1", "linux-6.12"])
def test_right_solutions_pass_as_other_kernels(profile: str) -> None:
    for exercise in ("merge", "mmap", "mprotect", "fork"):
        report = graded(exercise, solution(exercise), 10, profile)
        assert report.failure is None, report.failure.text()


# (exercise, in the solution, what stands there instead, the operation that must be named, what is said of it)
MUTANTS = [
    ("find-vma", "bisect_right", "bisect_left", "read", "find_vma"),
    ("find-vma", "at = bisect_right(mm.vmas, addr, key=lambda v: v.end)",
     "at = next((i for i, v in enumerate(mm.vmas) if v.end > addr), len(mm.vmas))", "read", "looked at"),
    ("fault", "vma is None or vma.start > addr", "vma is None", "read", "SEGV_MAPERR"),
    ("fault", "mm.find_vma(addr)",
     "next((v for v in mm.vmas if v.start <= addr <= v.end), None)", "write", "SEGV_MAPERR"),
    ("fault", "mm.ptes[page] = Pte(ZERO_FRAME)", "mm.ptes[page] = Pte(mm.new_frame())", "read", "zero page"),
    ("fault", "old.exclusive or mm.mapcount(old.frame) == 1", "old.exclusive", "write", "frame that it had"),
    ("fault", "(old.exclusive or mm.mapcount(old.frame) == 1)", "True", "write", "new frame"),
    ("fault", "    mm.anon_prepare(vma)\n", "", "write", "anon_vma"),
    ("fault", "Pte(mm.new_frame(), writable=True, exclusive=True)", "Pte(mm.new_frame(), writable=True)",
     "write", "exclusive"),
    ("fault", "        mm.flush_tlb(page * PAGE, page * PAGE + PAGE)", "        pass", "write", "TLB"),
    ("fault", "error_code & PF_PROT or ", "", "exec", "SEGV_ACCERR"),
    ("fault", "VM.READ | VM.WRITE | VM.EXEC", "VM.READ | VM.EXEC", "read", "SEGV_ACCERR"),
    ("fault", "SEGV_ACCERR\n    elif", "SEGV_MAPERR\n    elif", "write", "SEGV_MAPERR"),
    ("file-fault", "index >= mm.file_pages", "index > mm.file_pages", "read", "BUS_ADRERR"),
    ("file-fault", "vma.pgoff + page - first\n", "page - first\n", "write", ""),
    ("file-fault", "        around(mm, vma, page)", "        pass", "read", "page"),
    ("file-fault", "mm.is_anon(old.frame) and ", "", "write", "a new frame"),
    ("file-fault", "start + 16", "start + 8", "read", "page"),
    ("file-fault", "            mm.ptes[page] = Pte(mm.read_page(vma.file, index), writable=True)",
     "            mm.ptes[page] = Pte(mm.new_frame(), writable=True)", "write", "page 3 of /memfd:f"),
    ("brk", "new, old = page_align(addr), page_align(mm.brk)", "new, old = addr // 4096 * 4096, mm.brk",
     "brk", ""),
    ("brk", "mm.overlapping(old, new + PAGE)", "mm.overlapping(old, new)", "brk", "answer"),
    ("brk", "addr < mm.start_brk", "addr <= mm.start_brk", "brk", "answer"),
    ("brk", "heap.flags == HEAP", "True", "brk", "vma"),
    ("brk", "    mm.brk = addr\n    return addr", "    mm.brk = new\n    return addr", "brk", "break"),
    ("merge", "neighbour.flags != new.flags", "(neighbour.flags ^ new.flags) & 7", "mmap", "answer"),
    ("merge", " or neighbour.file != new.file", "", "mmap", "answer"),
    ("merge", " or neighbour.fork_child", "", "mmap", "answer"),
    ("merge", "neighbour.pgoff + neighbour.pages == new.pgoff", "True", "mmap", "answer"),
    ("mmap", "if flags & MAP_FIXED_NOREPLACE and mm.overlapping(addr, end):\n        return -errno.EEXIST",
     "if False:\n        pass", "mmap", "EEXIST"),
    ("mmap", "return -errno.EEXIST", "return -errno.EINVAL", "mmap", "EEXIST"),
    ("mmap", "    length = page_align(length)\n", "", "mmap", ""),
    ("mmap", "if mm.unmap(addr, end):", "if False:", "mmap", ""),
    ("mmap", "len(mm.vmas) > mm.max_map_count", "len(mm.vmas) >= mm.max_map_count", "mmap", "ENOMEM"),
    ("mmap", "            right = False", "            pass", "mmap", "vma"),
    ("mmap", "addr = addr // PAGE * PAGE\n", "pass\n", "mmap", "answer"),
    ("munmap", "    if last is not None and last.start < end:\n        mm.split(last, end)\n", "", "munmap", "vma"),
    ("munmap", "end = start + page_align(length)", "end = start + length // PAGE * PAGE", "munmap", ""),
    ("munmap", "            del mm.ptes[page]", "            pass", "munmap", "page"),
    ("munmap", "    mm.flush_tlb(start, end)\n", "", "munmap", "TLB"),
    ("munmap", ">= mm.max_map_count", "> mm.max_map_count", "munmap", "ENOMEM"),
    ("munmap", " or not page_align(length)", "", "munmap", "EINVAL"),
    ("mprotect", "(shared or pte.exclusive)", "True", "mprotect", "page"),
    ("mprotect", "(shared or pte.exclusive)", "shared", "mprotect", "page"),
    ("mprotect", "near.flags != flags", "(near.flags ^ flags) & 7", "mprotect", "vma"),
    ("mprotect", "right = mm.vma_at(end) if end == vma.end else None", "right = None", "mprotect", "vma"),
    ("mprotect", "        if vma is None:\n            return -errno.ENOMEM",
     "        if vma is None:\n            at += PAGE\n            continue", "mprotect", "ENOMEM"),
    ("mprotect", "return vma.anon_vma == near.anon_vma", "return True", "mprotect", "vma"),
    ("dontneed", "            result = -errno.ENOMEM\n", "", "madvise", "ENOMEM"),
    ("dontneed", "            result = -errno.ENOMEM\n", "            return -errno.ENOMEM\n", "madvise", "page"),
    ("dontneed", "        if vma.flags & VM.LOCKED:\n            return -errno.EINVAL\n", "", "madvise", "EINVAL"),
    ("fork", "                mm.ptes[page] = pte\n", "", "fork", "read-only"),
    ("fork", "        if not vma.anon_vma:\n            continue\n", "", "fork", "child"),
    ("fork", "& ~VM.LOCKED", "", "fork", "locked"),
    ("fork", "pte = Pte(pte.frame)", "pte = Pte(pte.frame, exclusive=pte.exclusive)", "fork", "exclusive"),
    ("fork", "        mm.flush_tlb(vma.start, vma.end)\n", "", "fork", "TLB"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "old", "new", "operation", "said"), MUTANTS)
def test_one_mistake_is_caught(
    exercise: str, old: str, new: str, operation: str, said: str, tmp_path: Path
) -> None:
    text = solution(exercise).read_text()
    if old.startswith("return vma.anon_vma"):
        old = "    if vma.anon_vma == near.anon_vma:\n        return True\n"
        new = "    return True\n"
    assert old in text
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace(old, new, 1))
    report = graded(exercise, wrong, 12)
    assert report.failure is not None
    assert f" {operation} " in f" {report.failure.operation} ", report.failure.text()
    assert said in report.failure.text()
