"""A fault in stages, as the kernel goes through them: error code, vma found, permission, walk, frame, what
changed. For `model step` and the course; the stages are read from the model's state before and after the
access, so they cannot say anything that the model did not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pagelens.model.abi import (
    ANON,
    FRAME_SHIFT,
    GUARD,
    PF_INSTR,
    PF_PROT,
    PF_USER,
    PF_WRITE,
    ZERO,
    A,
    D,
    P,
    W,
)
from pagelens.model.fault import AccessResult
from pagelens.model.op import ACCESSES
from pagelens.model.process import Process
from pagelens.model.space import Mm
from pagelens.vm.units import PAGE_SHIFT, page_down

_ERROR_BITS = (
    (PF_PROT, "protection"),
    (PF_WRITE, "write"),
    (PF_USER, "user"),
    (PF_INSTR, "instruction fetch"),
)
_PTE_BITS = ((P, "present"), (W, "writable"), (A, "accessed"), (D, "dirty"), (ANON, "anonymous"))

# Where the kernel ends up with an access that it refuses (arch/x86/mm/fault.c).
_SIGNALLED = {("SEGV", 1): "bad_area", ("SEGV", 2): "bad_area_access_error", ("BUS", 2): "do_sigbus"}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. name: access, error code, vma, permission, walk, result, changed. kernel: the function that
    does this."""

    name: str
    text: str
    kernel: str = ""


def error_text(code: int) -> str:
    """ "6: write, user; page not present"."""
    words = [word for bit, word in _ERROR_BITS if code & bit and bit != PF_PROT]
    cause = "page present, access not allowed by its entry" if code & PF_PROT else "page not present"
    return f"{code:#x}: {', '.join(words)}; {cause}"


def entry_text(pte: int, count: int = 1) -> str:
    """What a page-table entry of the model says; of `count` entries alike, the first."""
    if pte & GUARD:
        return "guard marker"
    if not pte & P:
        return "none"
    words = [word for bit, word in _PTE_BITS if pte & bit]
    first = pte >> FRAME_SHIFT
    if pte & ZERO:
        frame = "zero page"
    elif count == 1:
        frame = f"frame {first:#x}"
    else:
        frame = f"frames {first:#x}-{first + count - 1:#x}"
    return f"{frame}, {' '.join(words)}"


def access_stages(process: Process, addr: int, kind: str) -> Iterator[Stage]:
    """Do one access of one page (`kind`: read, write, exec) and tell it in stages. The access happens between
    the walk and the result, when the consumer asks for the stage after the walk."""
    mm = process.mm
    page = addr >> PAGE_SHIFT
    before = mm.tables.get(page)
    area = mm.areas.find(addr)
    yield Stage("access", f"{kind} at {addr:#x}", "")
    needs_write = kind == "write"
    yield Stage("walk (CPU)", _walk(process, addr))
    counts = _counts(mm)
    result = process.access(page_down(addr), 1, ACCESSES[kind])
    if not result.faults:
        changed = mm.tables.get(page)
        note = "" if changed == before else f"; the CPU set {_new_bits(before, changed)}"
        yield Stage("no fault", f"the entry allows it{note}", "")
        return
    fault = result.faults[-1]
    yield Stage("error code", error_text(fault.error_code), "exc_page_fault, do_user_addr_fault")
    if area is None or not area.start <= addr < area.end:
        grown = mm.areas.find(addr)
        if grown is not None and grown.start <= addr < grown.end:
            area = grown
            yield Stage("vma", f"none; the stack below grew to {grown.start:#x}", "expand_stack")
        else:
            near = f"; the next one starts at {area.start:#x}" if area is not None else ""
            yield Stage("vma", f"none holds {addr:#x}{near}", "find_vma, lock_mm_and_find_vma")
    else:
        perms = "".join(letter if area.flags & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4)))
        yield Stage("vma", f"{area.start:#x}-{area.end:#x} {perms}", "find_vma, lock_vma_under_rcu")
        right = "write" if needs_write else "fetch" if kind == "exec" else "read"
        refused = result.signal == "SEGV" and result.si_code == 2
        yield Stage("permission", f"{right} is {'refused' if refused else 'allowed'}", "access_error")
    if result.signal is None:
        yield Stage("walk", _walk(process, addr), "__handle_mm_fault")
    anon = area is None or area.is_anon
    kernel = _SIGNALLED.get((result.signal or "", result.si_code), "handle_pte_fault")
    yield Stage("result", _result(result, before, mm.tables.get(page), anon), kernel)
    yield Stage("changed", _changes(process, counts, before, mm.tables.get(page)), "")


def _walk(process: Process, addr: int) -> str:
    steps = [
        f"{level}[{index}]{'' if there else ' empty'}" for level, index, there in process.mm.tables.walk(addr)
    ]
    pte = process.mm.tables.get(addr >> PAGE_SHIFT)
    return " > ".join(steps) + (f": {entry_text(pte)}" if pte else "")


def _new_bits(before: int, after: int) -> str:
    return " and ".join(word for bit, word in _PTE_BITS if after & ~before & bit) or "nothing"


def _result(result: AccessResult, before: int, after: int, anon: bool) -> str:
    fault = result.faults[-1]
    if result.signal is not None:
        what = {("SEGV", 1): "SEGV_MAPERR", ("SEGV", 2): "SEGV_ACCERR", ("BUS", 2): "BUS_ADRERR"}
        name = what.get((result.signal, result.si_code), str(result.si_code))
        return f"SIG{result.signal}, {name} at {result.addr:#x}; not counted as a fault"
    kind = "major" if fault.major else "minor"
    if not before & P and after & ZERO:
        how = "the zero page, read-only: the first write will fault again (do_anonymous_page)"
    elif not before & P and after & ANON:
        made = "do_anonymous_page" if anon else "do_cow_fault: the page's copy"
        how = f"a new frame of the process's own ({made})"
    elif not before & P:
        how = "a page of the file's cache (do_read_fault or do_shared_fault)"
    elif before & ZERO:
        how = "a new frame of zeros in place of the zero page (wp_page_copy)"
    elif before >> FRAME_SHIFT == after >> FRAME_SHIFT:
        how = "the same frame, writable now (wp_page_reuse)"
    else:
        how = "copied to a new frame (wp_page_copy)"
    return f"{kind} fault: {how}"


def _counts(mm: Mm) -> dict[str, int]:
    tables = mm.tables
    return {
        "RssAnon": mm.rss_anon,
        "RssFile": mm.rss_file,
        "RssShmem": mm.rss_shmem,
        "p4d": len(tables.p4d_tables),
        "pud": len(tables.pud_tables),
        "pmd": len(tables.pmd_tables),
        "pte": len(tables.pte_tables),
    }


def _changes(process: Process, counts: dict[str, int], before: int, after: int) -> str:
    more = {name: now - counts[name] for name, now in _counts(process.mm).items()}
    parts = [f"{name} {more[name]:+d}" for name in ("RssAnon", "RssFile", "RssShmem") if more[name]]
    if made := [name for name in ("p4d", "pud", "pmd", "pte") if more[name]]:
        parts.append(f"page tables {sum(more[name] for name in made):+d} ({', '.join(made)})")
    if before != after:
        parts.insert(0, f"entry: {entry_text(before)} -> {entry_text(after)}")
    return "; ".join(parts) or "nothing"
