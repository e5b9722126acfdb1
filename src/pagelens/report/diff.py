"""diff: two snapshots; which fields changed, by which pages, from which stores.

Address by address where both are of one address space (or of a fork's two sides); else by named region,
because addresses of two programs have nothing to do with each other. Stores come from recorded faults: a
page cannot change its state in the page table without a fault, a call or a daemon, so each changed page is
looked up among the faults between the two snapshots, and what no fault explains is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagelens.report import transitions
from pagelens.vm.pages import PageRuns, PageState, distinct
from pagelens.vm.regions import Region
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import AddrRange
from pagelens.why.files import Files

_NOT_SUMS = frozenset({"KernelPageSize", "MMUPageSize", "THPeligible", "ProtectionKey"})


@dataclass(frozen=True, slots=True)
class Moment:
    """One side: a snapshot with its regions, and a word for it ("now", "exit of a.plens")."""

    shot: Snapshot
    regions: Sequence[Region]
    name: str


@dataclass
class PageChange:
    """A run of pages that changed in the same way. state bits as PageState; index: region in the later
    side."""

    start: int
    pages: int
    before: int
    after: int
    copied: bool
    kind: str
    region: str
    file_vma: bool
    effect: dict[str, int]
    what: str
    symbol: str = ""
    faults: int = 0
    stores: list[dict[str, Any]] = field(default_factory=list)
    chain: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Diff:
    """Result. by: "address" or "region". fields: smaps and status rows; explained: field -> (by pages, in
    all)."""

    a: Moment
    b: Moment
    by: str
    fields: list[dict[str, Any]]
    regions: list[dict[str, Any]]
    pages: list[PageChange]
    explained: dict[str, tuple[int, int]]
    notes: list[str] = field(default_factory=list)
    where: AddrRange | None = None


def compare(a: Moment, b: Moment, *, where: AddrRange | None = None, by: str = "auto") -> Diff:
    """Compare two moments. by: address, region, or auto (address if half of the vmas lie where they lay)."""
    if by == "auto":
        by = "address" if _same_space(a.shot, b.shot) else "region"
    fields = _fields(a.shot, b.shot, where)
    notes = [f"{m.name}: {n}" for m in (a, b) for n in m.shot.notes]
    if by == "region":
        return Diff(a, b, by, fields, _by_region(a, b), [], {}, notes)
    pages = _pages(a, b, where)
    explained: dict[str, tuple[int, int]] = {}
    if a.shot.pages is not None and b.shot.pages is not None:
        total = {r["field"]: r["change"] for r in fields}
        for name in transitions.FIELDS:
            by_pages = sum(p.effect.get(name, 0) * p.pages for p in pages)
            if by_pages or total.get(name, 0):
                explained[name] = (by_pages, total.get(name, 0))
    else:
        notes.append("page states are not in both snapshots: only fields and vmas are compared")
    return Diff(a, b, by, fields, _by_address(a, b, where), pages, explained, notes, where)


def _same_space(a: Snapshot, b: Snapshot) -> bool:
    mine, theirs = set(a.vmas.starts.tolist()), set(b.vmas.starts.tolist())
    return 2 * len(mine & theirs) >= max(1, min(len(mine), len(theirs)))


def _fields(a: Snapshot, b: Snapshot, where: AddrRange | None) -> list[dict[str, Any]]:
    rows = []
    before, after = _totals(a, where), _totals(b, where)
    for name in dict.fromkeys([*before, *after]):
        if name in _NOT_SUMS or before.get(name, 0) == after.get(name, 0):
            continue
        old, new = before.get(name, 0), after.get(name, 0)
        rows.append({"field": name, "before": old, "after": new, "change": new - old})
    return rows


def _totals(shot: Snapshot, where: AddrRange | None) -> dict[str, int]:
    account = shot.accounting
    if account is None:
        return {}
    if where is None:
        return {**account.total, **account.status}
    if account.per_vma is None:
        return {}
    rows = [i for i, v in enumerate(shot.vmas) if v.start < where.end and v.end > where.start]
    return {f: int(account.column(f)[rows].sum()) for f in account.fields}


def _by_address(a: Moment, b: Moment, where: AddrRange | None) -> list[dict[str, Any]]:
    # vmas that came, went, or changed in rights, extent or any field.
    def rows(m: Moment) -> dict[tuple[int, int], tuple[int, Region]]:
        first: dict[int, Region] = {}
        for region in m.regions:
            first.setdefault(region.vma, region)
        return {(v.start, v.end): (i, first[i]) for i, v in enumerate(m.shot.vmas) if i in first}

    old, new = rows(a), rows(b)
    out = []
    for key in sorted(old.keys() | new.keys()):
        if where is not None and (key[1] <= where.start or key[0] >= where.end):
            continue
        one, two = old.get(key), new.get(key)
        row: dict[str, Any] = {"start": key[0], "end": key[1], "region": (two or one)[1].label}  # type: ignore[index]
        if one is None or two is None:
            side, index = (b, two[0]) if two is not None else (a, one[0])  # type: ignore[index]
            sizes = _sizes(side.shot, index)
            changes = {f: [0, v] if one is None else [v, 0] for f, v in sizes.items() if v}
            out.append({**row, "what": "came" if one is None else "went", "changes": changes})
            continue
        changes = {}
        for f, (x, y) in _pairs(a.shot, one[0], b.shot, two[0]).items():
            if x != y and f not in _NOT_SUMS:
                changes[f] = [x, y]
        rights = a.shot.vmas[one[0]].perms, b.shot.vmas[two[0]].perms
        if changes or rights[0] != rights[1]:
            what = "changed" if rights[0] == rights[1] else f"{rights[0]} to {rights[1]}"
            out.append({**row, "what": what, "changes": changes})
    return out


def _sizes(shot: Snapshot, row: int) -> dict[str, int]:
    account = shot.accounting
    if account is None or account.per_vma is None:
        return {"Size": shot.vmas[row].size}
    return {f: int(account.column(f)[row]) for f in account.fields if f not in _NOT_SUMS}


def _pairs(a: Snapshot, i: int, b: Snapshot, j: int) -> dict[str, tuple[int, int]]:
    one, two = a.accounting, b.accounting
    if one is None or two is None or one.per_vma is None or two.per_vma is None:
        return {}
    both = [f for f in one.fields if f in two.fields]
    return {f: (int(one.column(f)[i]), int(two.column(f)[j])) for f in both}


def _by_region(a: Moment, b: Moment) -> list[dict[str, Any]]:
    def sums(m: Moment) -> dict[str, dict[str, int]]:
        out: dict[str, dict[str, int]] = {}
        seen: set[int] = set()
        account = m.shot.accounting
        for region in m.regions:
            row = out.setdefault(region.label, {})
            row["Size"] = row.get("Size", 0) + region.end - region.start
            if region.vma in seen or account is None or account.per_vma is None:
                continue
            seen.add(region.vma)
            for f in account.fields:
                if f not in _NOT_SUMS and f != "Size":
                    row[f] = row.get(f, 0) + int(account.column(f)[region.vma])
        return out

    old, new = sums(a), sums(b)
    rows: list[dict[str, Any]] = []
    for label in dict.fromkeys([*old, *new]):
        one, two = old.get(label, {}), new.get(label, {})
        names = dict.fromkeys([*one, *two])
        changes = {f: [one.get(f, 0), two.get(f, 0)] for f in names if one.get(f, 0) != two.get(f, 0)}
        what = "came" if not one else "went" if not two else "changed"
        if changes:
            rows.append({"start": None, "end": None, "region": label, "what": what, "changes": changes})
    key = "Rss"
    rows.sort(key=lambda r: -abs(r["changes"].get(key, [0, 0])[1] - r["changes"].get(key, [0, 0])[0]))
    return rows


def _pages(a: Moment, b: Moment, where: AddrRange | None) -> list[PageChange]:
    one, two = a.shot.pages, b.shot.pages
    if one is None or two is None:
        return []
    if where is not None:
        one, two = one.clipped(where.start, where.end), two.clipped(where.start, where.end)
    addr = distinct(np.concatenate((one.addresses(), two.addresses())))
    if not len(addr):
        return []
    before, pfn_a = _column(one, addr)
    after, pfn_b = _column(two, addr)
    copied = (pfn_a != pfn_b) & (pfn_a != 0) & (pfn_b != 0)
    keep = np.flatnonzero((before != after) | copied)
    if not len(keep):
        return []
    addr, before, after, copied = addr[keep], before[keep], after[keep], copied[keep]
    # A page is named by the later side, or by the earlier one where it is gone.
    place = _region_index(b.regions, addr)
    old_place = _region_index(a.regions, addr)
    key = np.stack((before, after, copied, place, np.where(place < 0, old_place, 0)), axis=1)
    breaks = (
        np.flatnonzero((np.diff(addr) != 4096) | (np.diff(key.astype(np.int64), axis=0) != 0).any(axis=1)) + 1
    )
    first = np.concatenate(([0], breaks))
    count = np.diff(np.concatenate((first, [len(addr)])))
    out = []
    for i, n in zip(first.tolist(), count.tolist(), strict=True):
        side, index = (b, int(place[i])) if place[i] >= 0 else (a, int(old_place[i]))
        region = side.regions[index] if index >= 0 else None
        vma = side.shot.vmas[region.vma] if region else None
        file_vma = bool(vma and vma.inode and not vma.shared)
        memory = bool(vma and vma.shared and Files().in_memory(vma.dev, vma.name))
        old, new, moved = int(before[i]), int(after[i]), bool(copied[i])
        if a.shot.pid != b.shot.pid:
            what = transitions.compare(old, new, copied=moved)
        else:
            what = transitions.describe(old, new, file_vma=file_vma, copied=moved, memory=memory)
        out.append(
            PageChange(
                start=int(addr[i]),
                pages=n,
                before=old,
                after=new,
                copied=moved,
                kind=str(region.kind) if region else "unmapped",
                region=region.label if region else "unmapped",
                file_vma=file_vma,
                effect=transitions.effect(old, new, memory=memory),
                what=what,
            )
        )
    return out


def _column(runs: PageRuns, addr: Any) -> tuple[Any, Any]:
    # (state, pfn) at each address; 0 where there is no page.
    mine = runs.addresses()
    state, pfn = np.zeros(len(addr), np.uint32), np.zeros(len(addr), np.uint64)
    at = np.searchsorted(addr, mine)
    state[at] = runs.states() & np.uint32(transitions.SHOWN)
    if runs.pfn is not None:
        present = (runs.states() & np.uint32(PageState.PRESENT)) != 0
        pfn[at] = np.where(present, runs.pfn, 0)
    return state, pfn


def _region_index(regions: Sequence[Region], addr: Any) -> Any:
    if not regions:
        return np.full(len(addr), -1, np.int64)
    starts = np.array([r.start for r in regions], np.uint64)
    ends = np.array([r.end for r in regions], np.uint64)
    index = np.searchsorted(starts, addr, side="right").astype(np.int64) - 1
    return np.where((index >= 0) & (addr < ends[np.maximum(index, 0)]), index, -1)
