"""What `model run --show` and `model step` print of a model's state: in the form of the kernel's own
files."""

from __future__ import annotations

from collections.abc import Sequence

from pagelens.model.explain import entry_text
from pagelens.model.runner import ModelWorld
from pagelens.vm.pages import PageState
from pagelens.vm.units import PAGE_SHIFT
from pagelens.vm.vma import Vma


def show(world: ModelWorld, what: str, procs: Sequence[str] | None = None) -> str:
    """Text of `maps`, `smaps`, `pagemap`, `tables` or `events` for processes (default: all)."""
    names = [p for p in (procs or list(world.alive())) if world.is_leader(p)]
    if what == "events":
        return _events(world)
    parts = []
    for name in names:
        text = {"maps": _maps, "smaps": _smaps, "pagemap": _pagemap, "tables": _tables}[what](world, name)
        parts.append(f"{name}:\n{text}" if len(names) > 1 else text)
    return "\n".join(parts)


def _line(vma: Vma) -> str:
    return f"{vma.start:012x}-{vma.end:012x} {vma.perms} {vma.offset:08x} {vma.name}".rstrip()


def _maps(world: ModelWorld, proc: str) -> str:
    return "\n".join(_line(v) for v in world.vmas(proc)) or "(nothing mapped)"


def _smaps(world: ModelWorld, proc: str) -> str:
    # Only fields that are not zero: the rest says nothing.
    vmas, accounting = world.accounting(proc)
    ours = {v.start for v in world.vmas(proc)}
    lines = []
    assert accounting.per_vma is not None
    for vma, row in zip(vmas, accounting.per_vma.tolist(), strict=True):
        if vma.start in ours:
            lines.append(_line(vma))
            pairs = zip(accounting.fields, row, strict=True)
            fields = [f"{name} {value // 1024} kB" for name, value in pairs if value]
            lines.append("    " + ", ".join(fields))
            if vma.vm_flags is not None:
                lines.append("    VmFlags: " + " ".join(sorted(vma.vm_flags)))
    return "\n".join(lines) or "(nothing mapped)"


def _pagemap(world: ModelWorld, proc: str) -> str:
    snapshot = world.processes[proc].snapshot(accounting=False)
    ours = world.vmas(proc)
    lines = []
    for start, count, state in snapshot.pages or ():
        if ours.find(start) is not None:
            names = " ".join((f.name or "").lower() for f in PageState if f and f in state)
            lines.append(f"{start:012x} {count:6d} page{'s' if count > 1 else ' '} {names}")
    return "\n".join(lines) or "(no page has an entry)"


def _tables(world: ModelWorld, proc: str) -> str:
    tables = world.processes[proc].mm.tables
    lines = [
        f"tables: {len(tables.pte_tables)} of entries, {len(tables.pmd_tables)} of them (pmd),"
        f" {len(tables.pud_tables)} above (pud)"
        f"{f', {len(tables.p4d_tables)} above those (p4d)' if tables.levels == 5 else ''}, the top one (pgd)"
    ]
    for vma in world.vmas(proc):
        runs = list(tables.runs(vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT)) or [
            (vma.start >> PAGE_SHIFT, 1, 0)
        ]
        for page, count, entry in runs:
            *upper, (level, index, there) = tables.walk(page << PAGE_SHIFT)
            which = f"{index}:{index + count}" if count > 1 else index
            steps = "".join(f"{name}[{i}] > " for name, i, _ in upper)
            steps += f"{level}[{which}]{'' if there or entry else ' empty'}"
            text = f": {entry_text(entry, count)}" if entry else ""
            lines.append(f"{page << PAGE_SHIFT:012x} {steps}{text}")
    lines += [f"flush owed: {start:#x}-{end:#x} ({why})" for start, end, why in tables.flushes[-8:]]
    return "\n".join(lines)


def _events(world: ModelWorld) -> str:
    lines = []
    for e in world.machine.events.entries:
        if e.kind == "fault":
            kind = "failed" if e.failed else "major" if e.major else "minor"
            times = f" x{e.count}" if e.count > 1 else ""
            lines.append(
                f"{e.seq:6d} pid {e.pid} fault {e.addr or 0:#x} error {e.error_code or 0:#x} {kind}{times}"
            )
        else:
            args = ", ".join(f"{a:#x}" for a in e.args)
            gup = f", {e.gup} faults inside" if e.gup else ""
            lines.append(f"{e.seq:6d} pid {e.pid} {e.name}({args}) = {e.result or 0:#x}{gup}")
    return "\n".join(lines)
