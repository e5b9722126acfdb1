"""Why a page is as it is: the events that touched its address, newest first.

Each page keeps only the id of its last event, each event the ranges that it touched; the chain is found by
walking the log back, following moves (mremap) and forks into the parent. Rejected: a list of events a page
(a million pages touched by ten calls would cost more than the pages).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagelens.model.abi import SHIFT
from pagelens.model.events import Entry
from pagelens.model.space import Mm

if TYPE_CHECKING:
    from pagelens.model.machine import Machine


def last_event(mm: Mm, addr: int) -> int:
    """Id of the event that last changed the page's entry, else of that which shaped its area, else 0."""
    event = mm.tables.event_of(addr >> SHIFT)
    if event:
        return event
    area = mm.areas.at(addr)
    return area.event if area is not None else 0


def chain(machine: Machine, mm: Mm, addr: int) -> list[Entry]:
    """Entries that touched addr, newest first. Calls that failed are left out."""
    number, parent = mm.number, mm.parent
    out: list[Entry] = []
    for entry in reversed(machine.events.entries):
        if parent is not None and entry.seq == parent[1]:
            out.append(entry)
            number = parent[0]
            parent = machine.parents.get(number)
            continue
        if entry.mm != number or not any(low <= addr < high for low, high in entry.ranges):
            continue
        if entry.kind == "syscall" and entry.result is not None and entry.result < 0:
            continue
        out.append(entry)
        if entry.name == "mremap" and entry.result is not None:
            old, _size, new_size = entry.args[:3]
            if entry.result != old and entry.result <= addr < entry.result + new_size:
                addr = old + (addr - entry.result)
    return out
