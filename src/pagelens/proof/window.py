"""Sequences beyond the window that mmap keeps to (DEFAULT_MAP_WINDOW), where page tables have five levels."""

from __future__ import annotations

from pagelens.model import op as ops
from pagelens.model.op import Op, Place
from pagelens.proof.ground import Ground
from pagelens.vm.units import HPAGE_PAGES, PAGE_SIZE, TASK_SIZE, TASK_SIZE_LA57

_TABLE = 1 << 48  # what one entry of the top table covers
_KEPT = 40  # pages on either side of an edge


def above_window(g: Ground) -> list[Op]:
    """Mappings by hint or fixed at, across or above the window's end, the edges of top-level entries and the end of
    user space; moved there and back, touched, copied by fork, taken away over the edge."""
    r = g.random
    edge = r.choice((TASK_SIZE, TASK_SIZE, _TABLE, _TABLE, r.randint(2, 255) * _TABLE, TASK_SIZE_LA57))
    pages = r.choice((1, 2, 4, 8, 16, HPAGE_PAGES))
    at = edge - r.randint(0, min(pages, _KEPT)) * PAGE_SIZE
    out: list[Op] = []
    if r.random() < 0.3:
        out.append(g.on("munmap", edge - _KEPT * PAGE_SIZE, 2 * _KEPT))
    flags = ops.PRIVATE | ops.ANONYMOUS if r.random() < 0.7 else ops.SHARED | ops.ANONYMOUS
    kind = r.random()
    if kind < 0.4:
        for _ in range(r.randint(1, 3)):  # the second finds its place taken
            hinted = g.map(
                at, pages, r.choice((1, 3, 3, 7)), flags | r.choice((0, 0, ops.MAP_WORDS["32bit"]))
            )
            out += [hinted, Op("write", g.proc, place=Place(hinted.result), length=PAGE_SIZE)]
    elif kind < 0.75:
        out += [g.map(at, pages, 3, flags | ops.FIXED), g.on("write", at, r.randint(1, min(pages, 8)))]
        if g.room and r.random() < 0.4:
            child = g.name("p")
            out += [Op("fork", g.proc, child), Op("write", child, place=g.at(at), length=PAGE_SIZE)]
    else:
        source = g.spot(16)
        count = min(pages, 16)
        out += [g.map(source, count), g.on("write", source, r.randint(1, count))]
        out += [g.move(source, count, at, r.choice((3, 3, 5, 7)))]
        if r.random() < 0.5:
            out.append(g.move(at, count, g.spot(16), r.choice((1, 3))))
    if r.random() < 0.5:
        first, count = edge - 2 * PAGE_SIZE, r.choice((2, 3, 4))
        out.append(
            r.choice(
                (
                    g.on("munmap", first, count),
                    g.on("mprotect", first, count, prot=1),
                    g.on("madvise", first, count, flags=ops.ADVICE_WORDS["dontneed"]),
                )
            )
        )
    return out
