"""Each page and area knows the event that put it into its state, and the chain before it."""

from __future__ import annotations

from model.support import BASE, PAGE, RW, anon, process
from pagelens.model import Machine
from pagelens.model.provenance import last_event
from pagelens.vm.events import EVENTS


def names(p: object, addr: int) -> list[str]:
    return [e.name or f"fault {e.error_code}" for e in p.provenance(addr)]  # type: ignore[attr-defined]


def test_chain_through_fork_and_move() -> None:
    p = process()
    a = anon(p, 16, page=0)
    p.access(a, 16 * PAGE, "w")
    p.mprotect(a, 4 * PAGE, 1)
    p.mprotect(a, 4 * PAGE, RW)
    child = p.fork()
    p.access(a + PAGE, 1, "w")  # the parent's business
    b = child.mremap(a, 16 * PAGE, 16 * PAGE, 3, BASE + 100 * PAGE)
    child.access(b + PAGE, 1, "w")
    assert names(child, b + PAGE) == ["fault 7", "mremap", "fork", "mprotect", "mprotect", "fault 6", "mmap"]
    assert names(p, a + PAGE) == ["fault 7", "mprotect", "mprotect", "fault 6", "mmap"]
    assert names(child, b + 8 * PAGE) == ["mremap", "fork", "fault 6", "mmap"]


def test_each_page_of_a_batch_has_its_own_event() -> None:
    p = process()
    a = anon(p, 100)
    got = p.access(a, 100 * PAGE, "w")
    first = got.faults[0].seq
    assert [last_event(p.mm, a + i * PAGE) for i in range(100)] == list(range(first, first + 100))
    entry = p.machine.events.find(first + 42)
    assert entry is not None and (entry.seq, entry.count) == (first, 100)
    rows = p.machine.events.rows()
    assert (rows[43]["seq"], rows[43]["addr"]) == (first + 42, a + 42 * PAGE)
    assert set(rows[0]) == {c.name for c in EVENTS}


def test_untouched_page_is_explained_by_its_area() -> None:
    p = process()
    a = anon(p, 4)
    entry = p.machine.events.find(last_event(p.mm, a))
    assert entry is not None and entry.name == "mmap"
    p.mprotect(a, PAGE, 1)
    entry = p.machine.events.find(last_event(p.mm, a))
    assert entry is not None and entry.name == "mprotect"
    assert last_event(p.mm, 0x1000) == 0


def test_a_machine_that_keeps_no_events_still_numbers_them() -> None:
    p = Machine("linux-6.18", keep_events=False).spawn()
    a = anon(p, 4)
    p.access(a, 4 * PAGE, "w")
    assert (len(p.machine.events.entries), p.min_flt) == (0, 4)
    assert last_event(p.mm, a + PAGE) == last_event(p.mm, a) + 1
    assert p.provenance(a) == []
