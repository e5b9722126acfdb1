"""Which stores changed the pages of a diff: recorded faults joined with its page changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pagelens.capture.reader import Capture
from pagelens.linux import elf
from pagelens.linux.symbols import Place, Symbolizer
from pagelens.report import faults as report
from pagelens.report import transitions
from pagelens.report.diff import Diff
from pagelens.vm.snapshot import Snapshot
from pagelens.vm.units import page_down
from pagelens.vm.vma import Vma, VmaList

_CHAINS = 200  # page runs whose single faults are listed; more would drown the reader


def attribute(diff: Diff, capture: Capture, mm: int) -> None:
    """Fill in symbol, faults, stores and chain of each page change, from the faults of address space `mm`.

    stores: the functions of the faults between the two moments, most first. chain: all faults on the run's
    first page since the recording began, oldest first, each with what it was, from where, and its cause.
    """
    loaded = report.load(capture)
    c = loaded.columns
    mine = np.flatnonzero(c["mm"] == mm)
    order = mine[np.argsort(c["time_ns"][mine], kind="stable")]
    index, places = report.places(loaded, c["pid"][order], loaded.ip_area[order], c["ip"][order])
    addr, time = c["addr"][order], c["time_ns"][order]
    causes = _causes(capture)
    low, high = diff.a.shot.time_ns, diff.b.shot.time_ns
    between = (time > low) & (time <= high)
    symbolizer = loaded.symbolizer
    unseen = 0
    # Faults by address, and by time within a page: a change then looks at its own faults only.
    by_page = np.lexsort((time, addr >> np.uint64(12)))
    pages = addr[by_page] >> np.uint64(12)
    for number, change in enumerate(diff.pages):
        page = change.start >> 12
        edges = np.searchsorted(pages, np.array([page, page + 1, page + change.pages], np.uint64))
        here = by_page[edges[0] : edges[2]]
        hits = here[between[here]]
        change.faults = len(hits)
        which, count = np.unique(index[hits], return_counts=True)
        change.stores = _stores([places[i] for i in which.tolist()], count.tolist())
        if not len(hits):
            unseen += change.pages
        if number >= _CHAINS:
            continue
        first = by_page[edges[0] : edges[1]]
        chain = first[time[first] <= high]
        change.chain = [
            {
                "seq": int(c["seq"][order[i]]),
                "time_ns": int(time[i]),
                "between": bool(between[i]),
                "addr": int(addr[i]),
                "what": report.describe_error(
                    int(c["error_code"][order[i]]) if c["error_code"][order[i]] >= 0 else 1024
                ),
                "from": str(places[int(index[i])]),
                "symbol": data_name(diff.b.shot, int(addr[i]), symbolizer),
                "cause": causes.get(int(c["seq"][order[i]])),
            }
            for i in chain.tolist()
        ]
        change.what = transitions.refine(change.what, change.before, change.after, change.file_vma,
                                         [r["what"] for r in change.chain if r["between"]])  # fmt: skip
        change.symbol = next((str(r["symbol"]) for r in reversed(change.chain) if r["symbol"]), "")
        if not change.symbol:
            change.symbol = data_name(diff.b.shot, change.start, symbolizer)
    if unseen:
        diff.notes.append(
            f"{unseen:,} changed pages have no fault of their own between the two moments: mapped around another"
            " fault, by a huge page, by a call (populate, munmap, madvise, fork) or by the kernel's daemons"
        )


def _stores(places: list[Place], counts: list[int]) -> list[dict[str, Any]]:
    # One row a line of source, most faults first.
    rows: dict[str, dict[str, Any]] = {}
    for place, count in zip(places, counts, strict=True):
        fresh = {"function": place.function or None, "file": place.file or None, "line": place.line or None}
        row = rows.setdefault(str(place), {**fresh, "faults": 0})
        row["faults"] += count
    return sorted(rows.values(), key=lambda r: -int(r["faults"]))


def _causes(capture: Capture) -> dict[int, str]:
    # seq -> cause, where `why` can judge this capture.
    from pagelens.why import derived

    table = derived.table(derived.classify(capture))
    seqs, causes = table.column("seq").to_pylist(), table.column("cause").to_pylist()
    return dict(zip(seqs, causes, strict=True))


def data_name(shot: Snapshot, address: int, symbolizer: Symbolizer) -> str:
    """Name of the object at `address` in a program's or library's data or bss, "" elsewhere."""
    found = _image_at(shot.vmas, address)
    return "" if found is None else symbolizer.data(found[0], found[1], address - found[2]).function


def data_object(vmas: VmaList, address: int, symbolizer: Symbolizer) -> tuple[str, int, int] | None:
    """(name, start, end) of the object at `address` in a program's or library's data or bss."""
    found = _image_at(vmas, address)
    if found is None:
        return None
    path, build_id, bias = found
    extent = symbolizer.extent(path, build_id, address - bias)
    return None if extent is None else (extent[0], extent[1] + bias, extent[1] + bias + max(extent[2], 1))


def _image_at(vmas: VmaList, address: int) -> tuple[str, str, int] | None:
    # Path, build-id and load bias of the program or library in whose writable segments the address lies.
    index = int(vmas.find_many(np.array([address], np.uint64))[0])
    if index < 0 or (vmas[index].inode and not vmas[index].name.startswith("/")):
        return None
    head: Vma | None = None
    for back in range(index, max(-1, index - 9), -1):
        v = vmas[back]
        if v.inode and v.offset == 0 and not v.shared and v.name.startswith("/"):
            head = v
            break
    if head is None:
        return None
    path = head.name.removesuffix(" (deleted)")
    image = elf.read(path, head.inode)
    if image is None or not image.loads():
        return None
    bias = head.start - page_down(image.loads()[0].vaddr) if image.dynamic else 0
    vaddr = address - bias
    if not any(s.vaddr <= vaddr < s.vaddr + s.memsz and s.flags & 2 for s in image.loads()):
        return None
    return str(Path(path)), image.build_id, bias
