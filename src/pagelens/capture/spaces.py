"""Address spaces over time: the vma list of each mm at any moment of a capture, replayed from its calls.

Starts from the snapshot at exec (or attach), applies each recorded call that shapes the space
(`spacecalls`), copies on fork. So a fault can be joined with what was mapped there *then*: addresses are used
again after munmap, and the last snapshot knows only the survivors.

Which neighbours are one vma depends on which were written, so the lists that are shown (`at`, `changes`)
follow the recorded faults too, by the kernel's rules (`merging`). Rejected: judging merges by rights, flags
and file alone (right or wrong as address space layout randomization happened to place the mappings). Lookups
(`locate`) do not depend on merges and do not read the faults. `agreement` compares the replayed end with the
snapshot at exit and says how far they agree. What each page held is the business of `why`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagelens.capture.areas import Area, RecordedVmas, Space, find, space_of
from pagelens.capture.merging import forked, prepare, rules_of, touched
from pagelens.capture.reader import Capture
from pagelens.capture.spacecalls import AT_ENTRY, CALLS, Calls, counts
from pagelens.linux import elf
from pagelens.linux.regions import image_tenants
from pagelens.vm.names import call_text
from pagelens.vm.pages import distinct
from pagelens.vm.regions import Evidence, Kind, Region, Tenant, name_regions
from pagelens.vm.vma import Prot, Vma, VmaList


@dataclass(frozen=True, slots=True)
class Change:
    """One call that changed the list. gone, came: the vmas that the two lists do not share."""

    time_ns: int
    seq: int
    mm: int
    tid: int
    call: str
    gone: tuple[Vma, ...]
    came: tuple[Vma, ...]
    note: str


class Agreement(NamedTuple):
    """How far the replayed ends are those of the kernel. vmas: of how many, start, end and rights are the
    same; pages: of how many mapped pages, the rights are. str(): the sentence that is printed."""

    same_vmas: int
    vmas: int
    same_pages: int
    pages: int

    def __str__(self) -> str:
        text = f"at exit {self.same_vmas:,} of {self.vmas:,} vmas as the kernel had them"
        if self.same_vmas == self.vmas:
            return text
        if self.same_pages == self.pages:
            return text + "; all mapped pages with their rights, so only merges differ"
        return text + f", {self.same_pages:,} of {self.pages:,} mapped pages with their rights"


@dataclass(frozen=True, slots=True)
class _Faults:
    # Faults of one mm in order of time. kind: 0 read, 1 write; failed: 2 write, 3 read.
    time: npt.NDArray[np.int64]
    addr: npt.NDArray[np.uint64]
    kind: npt.NDArray[np.int64]


class Spaces:
    """The address spaces of a capture. notes: what the replay could not know."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.notes: list[str] = []
        self._children: dict[tuple[int, bool], dict[int, Space]] = {}
        self.labels: dict[Area, Region] = {}
        self._mms = {r["mm"]: r for r in capture.table("mms").to_pylist()}
        self._vmas = RecordedVmas(capture)
        self._base: dict[int, dict[str, Any]] = {}  # mm -> row of `snapshots` that it starts from
        self._last: dict[int, dict[str, Any]] = {}
        for row in sorted(capture.snapshot_rows(), key=lambda r: r["time_ns"]):
            if row["moment"] in ("exec", "attach", "start") and row["mm"] not in self._base:
                self._base[row["mm"]] = row
            else:
                self._last[row["mm"]] = row
        self._events = self._read_events()
        self._rules = rules_of(capture.meta.get("kernel", ""), capture.meta.get("settings") or {})
        self._calls = Calls(self._rules, self._vmas.paths, self._vmas.segments, self.notes)

    def _read_events(self) -> dict[int, list[dict[str, Any]]]:
        # mm -> its calls, in order of effect (key `effect`, ns).
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = [
            "seq", "time_ns", "mm", "tid", "name", "args", "result", "detail", "file_dev", "file_inode", "gup",
            "latency_ns",
        ]  # fmt: skip
        table = self.capture.events([*columns, "kind"])
        wanted = pc.and_(
            pc.equal(table.column("kind"), "syscall"),
            pc.is_in(pc.cast(table.column("name"), pa.string()), pa.array(sorted(CALLS))),
        )
        out: dict[int, list[dict[str, Any]]] = {}
        for row in table.filter(wanted).to_pylist():
            if row["result"] is None or row["mm"] is None or not counts(row["name"], row["result"]):
                continue
            late = 0 if row["name"] in AT_ENTRY else row["latency_ns"] or 0
            row["effect"] = row["time_ns"] + late
            out.setdefault(row["mm"], []).append(row)
        for rows in out.values():
            rows.sort(key=lambda r: (r["effect"], r["seq"]))
        return out

    @cached_property
    def _faults(self) -> dict[int, _Faults]:
        # mm -> its faults. Where the error code is not recorded, each counts as a write. One that fails may
        # have made the anon_vma before (do_cow_fault, for a page beyond the end of its file).
        import pyarrow.compute as pc

        table = self.capture.events(["time_ns", "seq", "mm", "addr", "error_code", "kind", "failed"])
        table = table.filter(
            pc.and_(pc.equal(table.column("kind"), "fault"), pc.is_valid(table.column("mm")))
        )
        mm = table.column("mm").to_numpy()
        order = np.argsort(mm, kind="stable")
        time = table.column("time_ns").to_numpy()[order]
        addr = pc.fill_null(table.column("addr"), 0).to_numpy()[order]
        write = (pc.fill_null(table.column("error_code"), 2).to_numpy() & 2) != 0
        failed = pc.fill_null(table.column("failed"), False).to_numpy()
        kind = np.where(failed, np.where(write, 2, 3), write)[order]
        numbers, first = np.unique(mm[order], return_index=True)
        ends = [*first[1:].tolist(), len(order)][: len(numbers)]  # none where no fault was recorded
        return {
            int(n): _Faults(time[a:b], addr[a:b], kind[a:b])
            for n, a, b in zip(numbers, first.tolist(), ends, strict=True)
        }

    def _touch(self, space: Space, mm: int, since: int, until: int) -> None:
        # The faults of [since, until): each distinct area is looked at once, not each fault.
        faults = self._faults.get(mm)
        if faults is None:
            return
        low, high = np.searchsorted(faults.time, [since, until])
        if low == high:
            return
        for kind in (1, 2, 0):
            at = np.flatnonzero(faults.kind[low:high] == kind) + low
            addr = distinct(faults.addr[at]) if len(at) > 1000 else faults.addr[at]
            while len(addr):
                start, end = touched(space, int(addr[0]), kind, self._rules)
                addr = addr[(addr < np.uint64(start)) | (addr >= np.uint64(end))]

    @property
    def mms(self) -> list[int]:
        """The numbers of all address spaces."""
        return sorted(self._mms)

    def _start(self, mm: int, exact: bool = True) -> tuple[int, Space]:
        # exact: with the anon_vmas that faults made, as merges need them.
        if mm in self._base:
            base = self._base[mm]
            space = space_of(self._vmas.of(base["snapshot"]))
            if exact:
                for i in self._vmas.anonymous(base["snapshot"]):
                    prepare(space, i)
                self._touch(space, mm, 0, base["time_ns"])
            return base["time_ns"], space
        row = self._mms.get(mm)
        if row is not None and row["origin"] == "fork" and row["parent_mm"] in self._mms:
            return row["time_ns"], self._forked(row["parent_mm"], exact)[mm].copy()
        self.notes.append(f"mm {mm}: no snapshot at its start, so only what calls mapped is known")
        return 0 if row is None else row["time_ns"], Space()

    def _forked(self, parent: int, exact: bool) -> dict[int, Space]:
        # child mm -> what it got; one walk over the parent serves all of its children.
        key = (parent, exact)
        if key not in self._children:
            forks = [r for r in self._mms.values() if r["origin"] == "fork" and r["parent_mm"] == parent]
            began, space = self._start(parent, exact)
            calls = [c for c in self._events.get(parent, []) if c["effect"] >= began]
            done, at = 0, began
            self._children[key] = found = {}
            for fork in sorted(forks, key=lambda r: r["time_ns"]):
                while done < len(calls) and calls[done]["effect"] <= fork["time_ns"]:
                    if exact:
                        self._touch(space, parent, at, calls[done]["effect"])
                        at = calls[done]["effect"]
                    self._calls.apply(space, calls[done])
                    done += 1
                if exact:
                    self._touch(space, parent, at, fork["time_ns"])
                    at = max(at, fork["time_ns"])
                found[fork["mm"]] = forked(space)
        return self._children[key]

    def _walk(self, mm: int, until: int | None = None) -> Iterator[tuple[int, Space, dict[str, Any] | None]]:
        # (time, space after it, call) for the start (call None) and each call; the last has all faults.
        at, space = self._start(mm)
        yield at, space, None
        end = 1 << 62 if until is None else until
        for row in self._events.get(mm, []):
            if row["effect"] < at or row["time_ns"] > end:
                continue
            self._touch(space, mm, at, row["effect"])
            at = row["effect"]
            self._calls.apply(space, row)
            yield row["time_ns"], space, row
        self._touch(space, mm, at, end)

    def at(self, mm: int, time_ns: int) -> list[Area]:
        """The areas of `mm` at `time_ns` (CLOCK_MONOTONIC), calls entered by then done."""
        space = Space()
        for _, state, _ in self._walk(mm, until=time_ns):
            space = state
        return list(space.areas)

    def changes(self, mm: int) -> Iterator[Change]:
        """Each call that changed the list of `mm`, with the vmas that went and came."""
        before: list[Area] = []
        for time, space, row in self._walk(mm):
            after = list(space.areas)
            if row is not None:
                gone, came = _difference(before, after)
                if gone or came:
                    text = call_text(row["name"], row["args"] or [], row["result"])
                    note = _describe(row["name"], gone, came)
                    yield Change(time, row["seq"], mm, row["tid"], text, gone, came, note)
            before = after

    def locate(
        self, mm: npt.NDArray[np.int64], time_ns: npt.NDArray[np.int64], addr: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.int64], list[Area]]:
        """For each (mm, time, address): index into the returned areas, -1 where nothing was mapped."""
        out = np.full(len(addr), -1, dtype=np.int64)
        areas: list[Area] = []
        number: dict[Area, int] = {}
        for one in np.unique(mm).tolist():
            mine = np.flatnonzero(mm == one)
            mine = mine[np.argsort(time_ns[mine], kind="stable")]
            calls = self._events.get(int(one), [])
            # First the queries before the start, then those between each two calls.
            ends = np.searchsorted(time_ns[mine], [c["effect"] for c in calls], side="left")
            began, space = self._start(int(one), exact=False)
            done = 0
            for call, end in zip([*calls, None], [*ends.tolist(), len(mine)], strict=True):
                if end > done:
                    batch = mine[done:end]
                    out[batch] = self._numbers(space, addr[batch], areas, number)
                    done = end
                if call is not None and call["effect"] >= began:
                    self._calls.apply(space, call)
        return out, areas

    def _numbers(
        self, space: Space, addr: npt.NDArray[np.uint64], areas: list[Area], number: dict[Area, int]
    ) -> npt.NDArray[np.int64]:
        # Index in the space -> index in `areas`, which grows by what is hit.
        found = find(space, addr)
        table = np.full(len(space.areas) + 1, -1, dtype=np.int64)  # the last entry serves -1
        for i in np.unique(found).tolist():
            if i < 0:
                continue
            area = replace(space.areas[i], anon=0, forked=False, shift=0)
            if area not in number:
                number[area] = len(areas)
                areas.append(area)
                self.labels[area] = self._label(space, i)
            table[i] = number[area]
        return table[found]

    def _label(self, space: Space, i: int) -> Region:
        # Named among its neighbours of that moment: bss needs its library, a guard its stack.
        low = max(0, i - 8)
        near = space.areas[low : i + 9]
        vmas, evidence = vma_list(near)
        return next(r for r in name_regions(vmas, evidence) if r.vma == i - low)

    def agreement(self) -> Agreement:
        """The replayed ends against the snapshots at exit."""
        figures = np.zeros(4, np.int64)
        for mm, row in self._last.items():
            if mm in self._base or self._mms.get(mm, {}).get("origin") == "fork":
                vmas = list(self._vmas.of(row["snapshot"]))
                figures += _agree([a.vma for a in self.at(mm, row["time_ns"])], vmas)
        return Agreement(*figures.tolist())


def _agree(replayed: list[Vma], vmas: list[Vma]) -> tuple[int, int, int, int]:
    # The figures of an Agreement; pages by one merge of two sorted lists.
    shapes = {(v.start, v.end, v.prot) for v in replayed}
    same = sum((v.start, v.end, v.prot) in shapes for v in vmas)
    pages, i = 0, 0
    for v in vmas:
        while i < len(replayed) and replayed[i].end <= v.start:
            i += 1
        j = i
        while j < len(replayed) and replayed[j].start < v.end:
            if replayed[j].prot == v.prot and replayed[j].shared == v.shared:
                pages += (min(v.end, replayed[j].end) - max(v.start, replayed[j].start)) >> 12
            j += 1
    return same, len(vmas), pages, sum(v.pages for v in vmas)


def vma_list(areas: list[Area]) -> tuple[VmaList, Evidence]:
    """For `name_regions`: the list; stacks known by MAP_STACK, bss and relro by the files' headers."""
    vmas = VmaList(a.vma for a in areas)
    tenants = [
        Tenant(
            a.vma.start, a.vma.end, Kind.THREAD_STACK, "stack of a thread", f"MAP_STACK, event {a.made_by}"
        )
        for a in areas
        if a.stack and a.vma.prot & Prot.WRITE
    ]
    tenants += image_tenants(vmas, lambda vma: elf.read(vma.name, vma.inode))
    return vmas, Evidence(tuple(tenants))


def _difference(before: list[Area], after: list[Area]) -> tuple[tuple[Vma, ...], tuple[Vma, ...]]:
    old, new = {a.vma for a in before}, {a.vma for a in after}
    gone = tuple(a.vma for a in before if a.vma not in new)
    came = tuple(a.vma for a in after if a.vma not in old)
    return gone, came


def _describe(call: str, gone: tuple[Vma, ...], came: tuple[Vma, ...]) -> str:
    if call in ("munmap", "shmdt"):
        return f"split in {len(came)}" if len(came) > len(gone) else "shrunk" if came else "unmapped"
    if not gone:
        return "new"
    if len(came) == 1 and came[0].size > max(v.size for v in gone):
        return "merged: one vma grew" if len(gone) == 1 else f"merged: {len(gone)} became one"
    if len(came) > len(gone):
        return f"split: {len(gone)} became {len(came)}"
    return "changed" if call != "mmap" else "mapped over"
