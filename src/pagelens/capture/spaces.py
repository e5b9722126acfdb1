"""Address spaces over time: the vma list of each mm at any moment of a capture, replayed from its calls.

Starts from the snapshot at exec (or attach), applies each recorded call that shapes the space, copies on
fork. So a fault can be joined with what was mapped there *then*: addresses are used again after munmap, and
the last snapshot knows only the survivors.

Merges are judged by equal rights, flags, file and offset; what the kernel also compares (anon_vma, memory
policy) is not in a capture, so a list may show one vma where the kernel keeps two, or the other way round.
Lookups do not depend on that. `agreement` compares the replayed end with the snapshot at exit and says how
far they agree. The exact rules are the model's business; this is the cheap view that needs no model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pagelens.capture.areas import Area, RecordedVmas, Space, find, shifted, space_of
from pagelens.capture.reader import Capture
from pagelens.linux import elf
from pagelens.linux.regions import image_tenants
from pagelens.vm.names import call_text
from pagelens.vm.regions import Evidence, Kind, Region, Tenant, name_regions
from pagelens.vm.units import page_up
from pagelens.vm.vma import Prot, Vma, VmaList

CALLS = frozenset(
    ("mmap", "munmap", "mprotect", "pkey_mprotect", "mremap", "brk", "madvise", "mlock", "mlock2", "munlock",
     "mlockall", "munlockall", "shmat", "shmdt")
)  # fmt: skip
_ADVICE: dict[int, tuple[str, str]] = {  # advice -> (flag set, flags cleared)
    0: ("", "sr rr"), 1: ("rr", "sr"), 2: ("sr", "rr"), 10: ("dc", ""), 11: ("", "dc"), 12: ("mg", ""),
    13: ("", "mg"), 14: ("hg", "nh"), 15: ("nh", "hg"), 16: ("dd", ""), 17: ("", "dd"), 18: ("wf", ""),
    19: ("", "wf"),
}  # fmt: skip
MAP_SHARED, MAP_ANON, MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE, MAP_STACK, MAP_HUGETLB = (
    1, 0x20, 0x100, 0x2000, 0x4000, 0x20000, 0x40000,
)  # fmt: skip


_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib", "/usr/local/lib",
)  # fmt: skip


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


class Spaces:
    """The address spaces of a capture. notes: what the replay could not know."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.notes: list[str] = []
        self._children: dict[int, dict[int, Space]] = {}
        self.labels: dict[Area, Region] = {}
        self._mms = {r["mm"]: r for r in capture.table("mms").to_pylist()}
        self._vmas = RecordedVmas(capture)
        self._paths: dict[tuple[str, int], str] = self._vmas.paths
        self._base: dict[int, dict[str, Any]] = {}  # mm -> row of `snapshots` that it starts from
        self._last: dict[int, dict[str, Any]] = {}
        for row in sorted(capture.snapshot_rows(), key=lambda r: r["time_ns"]):
            if row["moment"] in ("exec", "attach", "start") and row["mm"] not in self._base:
                self._base[row["mm"]] = row
            else:
                self._last[row["mm"]] = row
        self._events = self._read_events()
        self._stack_nh = _release(capture.meta.get("kernel", "")) >= (6, 7)
        self._shm_size = self._vmas.segments

    def _read_events(self) -> dict[int, list[dict[str, Any]]]:
        # mm -> its calls, in order.
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = [
            "seq",
            "time_ns",
            "mm",
            "tid",
            "name",
            "args",
            "result",
            "detail",
            "file_dev",
            "file_inode",
        ]
        table = self.capture.events([*columns, "kind"])
        wanted = pc.and_(
            pc.equal(table.column("kind"), "syscall"),
            pc.is_in(pc.cast(table.column("name"), pa.string()), pa.array(sorted(CALLS))),
        )
        out: dict[int, list[dict[str, Any]]] = {}
        for row in table.filter(wanted).to_pylist():
            if row["result"] is not None and row["result"] >= 0 and row["mm"] is not None:
                out.setdefault(row["mm"], []).append(row)
        return out

    @property
    def mms(self) -> list[int]:
        """The numbers of all address spaces."""
        return sorted(self._mms)

    def _start(self, mm: int) -> tuple[int, Space]:
        if mm in self._base:
            base = self._base[mm]
            return base["time_ns"], space_of(self._vmas.of(base["snapshot"]))
        row = self._mms.get(mm)
        if row is not None and row["origin"] == "fork" and row["parent_mm"] in self._mms:
            return row["time_ns"], self._forked(row["parent_mm"])[mm].copy()
        self.notes.append(f"mm {mm}: no snapshot at its start, so only what calls mapped is known")
        return 0 if row is None else row["time_ns"], Space()

    def _forked(self, parent: int) -> dict[int, Space]:
        # child mm -> what it got; one walk over the parent serves all of its children.
        if parent not in self._children:
            forks = [r for r in self._mms.values() if r["origin"] == "fork" and r["parent_mm"] == parent]
            began, space = self._start(parent)
            calls = [c for c in self._events.get(parent, []) if c["time_ns"] >= began]
            done = 0
            self._children[parent] = found = {}
            for fork in sorted(forks, key=lambda r: r["time_ns"]):
                while done < len(calls) and calls[done]["time_ns"] <= fork["time_ns"]:
                    self._apply(space, calls[done])
                    done += 1
                found[fork["mm"]] = space.copy()
        return self._children[parent]

    def _walk(self, mm: int, until: int | None = None) -> Iterator[tuple[int, Space, dict[str, Any] | None]]:
        # (time, space after it, call) for the start (call None) and each call.
        began, space = self._start(mm)
        yield began, space, None
        for row in self._events.get(mm, []):
            if until is not None and row["time_ns"] > until:
                return
            if row["time_ns"] < began:
                continue
            self._apply(space, row)
            yield row["time_ns"], space, row

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
            ends = np.searchsorted(time_ns[mine], [c["time_ns"] for c in calls], side="left")
            began, space = self._start(int(one))
            done = 0
            for call, end in zip([*calls, None], [*ends.tolist(), len(mine)], strict=True):
                if end > done:
                    batch = mine[done:end]
                    out[batch] = self._numbers(space, addr[batch], areas, number)
                    done = end
                if call is not None and call["time_ns"] >= began:
                    self._apply(space, call)
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
            area = space.areas[i]
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

    def _apply(self, space: Space, row: dict[str, Any]) -> None:
        name, args, result = row["name"], row["args"] or [], row["result"]
        if name == "mmap":
            self._mmap(space, row, args, result)
        elif name == "munmap":
            space.cut(args[0], page_up(args[0] + args[1]))
        elif name in ("mprotect", "pkey_mprotect"):
            end = page_up(args[0] + args[1])
            space.change(args[0], end, prot=Prot(args[2] & 7))
            if args[2] & 2:
                self._account(space, args[0], end)
        elif name == "mremap":
            self._mremap(space, row, args, result)
        elif name == "brk":
            self._brk(space, row, result)
        elif name == "madvise" and args[2] in _ADVICE:
            on, off = _ADVICE[args[2]]
            self._flags(space, args[0], args[1], on, off)
        elif name in ("mlock", "mlock2"):
            self._flags(space, args[0], args[1], "lo", "")
        elif name == "munlock":
            self._flags(space, args[0], args[1], "", "lo lf")
        elif name in ("mlockall", "munlockall"):
            on = "lo" if name == "mlockall" and args and args[0] & 1 else ""
            if on or name == "munlockall":
                self._flags(space, 0, 1 << 63, on, "" if on else "lo lf")
        elif name == "shmat":
            size = self._shm_size.get(args[0])
            if size is None:
                self.notes.append(f"shmat of segment {args[0]}: its size is not in the capture")
            else:
                vma = Vma(
                    result, result + size, Prot(1 if args[2] & 0o10000 else 3), True, 0, "00:01", args[0]
                )
                space.cut(vma.start, vma.end)
                name = f"/SYSV{0:08x} (deleted)"
                space.put(Area(vma.replaced(name=name, vm_flags=frozenset()), row["seq"]))
        elif name == "shmdt":
            i = space.index(args[0])
            if i >= 0:
                space.cut(space.areas[i].vma.start, space.areas[i].vma.end)

    def _account(self, space: Space, start: int, end: int) -> None:
        # A private mapping that becomes writable is accounted from now on.
        for area in space.cut(start, end):
            v = area.vma
            flags = v.vm_flags or frozenset()
            if not v.shared and "nr" not in flags:
                flags |= {"ac"}
            space.put(replace(area, vma=v.replaced(vm_flags=flags)))

    def _flags(self, space: Space, start: int, length: int, on: str, off: str) -> None:
        end = page_up(start + length)
        space.change(start, end, set=frozenset(on.split()), clear=frozenset(off.split()))

    def _mmap(self, space: Space, row: dict[str, Any], args: list[int], result: int) -> None:
        end = result + page_up(args[1])
        flags = args[3]
        extra = set()
        for bit, code in (
            (MAP_LOCKED, "lo"),
            (MAP_NORESERVE, "nr"),
            (MAP_GROWSDOWN, "gd"),
            (MAP_HUGETLB, "ht"),
        ):
            if flags & bit:
                extra.add(code)
        if flags & MAP_STACK and self._stack_nh:
            extra.add("nh")
        shared = flags & 3 in (1, 3)
        if args[2] & 2 and not shared and not flags & (MAP_NORESERVE | MAP_HUGETLB):
            extra.add("ac")
        dev, inode, name = "00:00", 0, ""
        if row["file_inode"]:
            major, minor = row["file_dev"] >> 8 & 0xFFF, row["file_dev"] & 0xFF
            dev, inode = f"{major:02x}:{minor:02x}", row["file_inode"]
            name = self._path(dev, inode, row["detail"] or "")
        elif shared and flags & MAP_ANON:
            name = "/dev/zero (deleted)"
        offset = args[5] if inode else 0
        vma = Vma(result, end, Prot(args[2] & 7), shared, offset, dev, inode, name, frozenset(extra))
        space.cut(result, end)
        space.put(Area(vma, row["seq"], bool(flags & MAP_STACK)))

    def _path(self, dev: str, inode: int, name: str) -> str:
        # An event has a file's name without its directory; snapshots have whole paths. Without them, the
        # usual library directories are tried, and the inode number decides.
        key = (dev, inode)
        if key not in self._paths:
            found = name
            for directory in _LIBRARIES if name and "/" not in name else ():
                path = os.path.join(directory, name)  # noqa: PTH118 (a few strings for each file)
                with contextlib.suppress(OSError):
                    if os.stat(path).st_ino == inode:  # noqa: PTH116 (likewise)
                        found = path
                        break
            self._paths[key] = found
        return self._paths[key]

    def _mremap(self, space: Space, row: dict[str, Any], args: list[int], result: int) -> None:
        old, old_len, new_len, flags = args[0], page_up(args[1]), page_up(args[2]), args[3]
        i = space.index(old)
        if i < 0:
            return
        area = space.areas[i]
        moved = shifted(area.vma, old) if old > area.vma.start else area.vma
        moved = moved.replaced(start=result, end=result + new_len)
        # MREMAP_DONTUNMAP leaves the old range; length 0 copies a shared mapping.
        if result == old or (not flags & 4 and old_len):
            space.cut(old, old + old_len)
        space.cut(result, result + new_len)
        space.put(Area(moved, row["seq"], area.stack))

    def _brk(self, space: Space, row: dict[str, Any], result: int) -> None:
        heap = next((a.vma for a in space.areas if a.vma.name == "[heap]"), None)
        old = space.brk or (heap.end if heap else result)
        space.brk = result
        low, high = page_up(old), page_up(result)
        if high > low:
            rw = Prot.READ | Prot.WRITE
            space.cut(low, high)
            flags = frozenset(("ac",))
            space.put(Area(Vma(low, high, rw, name="[heap]", vm_flags=flags), row["seq"]))
        elif high < low:
            space.cut(high, low)

    def agreement(self) -> tuple[int, int]:
        """(vmas that the replay and the last snapshots share, vmas in those snapshots): start, end and
        rights."""
        same = total = 0
        for mm, row in self._last.items():
            if mm not in self._base:
                continue
            replayed = {(a.vma.start, a.vma.end, a.vma.prot) for a in self.at(mm, row["time_ns"])}
            vmas = self._vmas.of(row["snapshot"])
            total += len(vmas)
            same += sum((v.start, v.end, v.prot) in replayed for v in vmas)
        return same, total


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


def _release(kernel: str) -> tuple[int, int]:
    # A capture cannot be probed any more: MAP_STACK means VM_NOHUGEPAGE since 6.7 (calc_vm_flag_bits).
    for word in kernel.split():
        parts = word.split(".")
        if len(parts) >= 2 and parts[0].isdigit() and parts[1].split("-")[0].isdigit():
            return int(parts[0]), int(parts[1].split("-")[0])
    return 0, 0
