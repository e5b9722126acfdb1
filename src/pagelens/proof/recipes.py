"""Short sequences on which one rule decides, for rules that operations picked one by one seldom reach.

Each is varied at random and lands among whatever the program has already made. Rejected: more weight for the
single operations (three of them must meet at one place, and a program of nothing else would reach nothing else).
"""

from __future__ import annotations

from collections.abc import Callable

from pagelens.model import op as ops
from pagelens.model.op import ARENA_MIDDLE, Op, Place
from pagelens.proof.ground import ANON, FAR_TABLES, Ground
from pagelens.proof.limits import at_a_limit
from pagelens.vm.units import HPAGE_PAGES, HPAGE_SIZE, PAGE_SIZE


def realign(g: Ground) -> list[Op]:
    """A move between equal offsets within a table, to the table's end (mremap_realigns)."""
    r = g.random
    offset = r.randint(4, 500)
    pages = HPAGE_PAGES - offset + r.choice((0, 0, 1, 100))
    source = FAR_TABLES + r.randrange(8) * 4 * HPAGE_SIZE + offset * PAGE_SIZE
    target = source + r.choice((2, 2, -2, 64)) * HPAGE_SIZE
    last = g.on("munmap", target, pages)
    return [
        g.on("munmap", source - offset * PAGE_SIZE, 4 * HPAGE_PAGES),
        g.on("munmap", target - offset * PAGE_SIZE, 2 * HPAGE_PAGES),
        g.map(source, pages),
        g.on("write", source, r.choice((1, 3))),
        g.move(source, pages, target, r.choice((3, 7, 7))),
        g.on("write", target + r.randrange(2) * PAGE_SIZE, 1),
        *([last] if r.random() < 0.7 else []),
    ]


def heap_neighbour(g: Ground) -> list[Op]:
    """A mapping that touches the heap (heap_name_overlaps)."""
    r = g.random
    start = g.names.regions["heap"]
    pages = r.choice((1, 2, 3))
    flags = ANON if r.random() < 0.8 else ops.SHARED | ops.ANONYMOUS | ops.FIXED
    return [
        g.on("munmap", start, 40),
        Op("brk", g.proc, place=Place("heap", pages * PAGE_SIZE)),
        g.map(start + pages * PAGE_SIZE, r.choice((1, 2)), r.choice((1, 3, 7)), flags),
    ]


def empty_table(g: Ground) -> list[Op]:
    """A whole table emptied by advice (pt_reclaim)."""
    r = g.random
    start = ARENA_MIDDLE if r.random() < 0.5 else ARENA_MIDDLE - HPAGE_SIZE
    word = r.choice(("dontneed", "dontneed", "dontneed", "dontneed_locked"))
    return [
        g.map(start, HPAGE_PAGES),
        g.on("write", start + r.randrange(HPAGE_PAGES - 4) * PAGE_SIZE, r.choice((1, 2, 4))),
        g.on("madvise", start, HPAGE_PAGES, flags=ops.ADVICE_WORDS[word]),
    ]


def close_hook(g: Ground) -> list[Op]:
    """Parts of a System V segment that may merge (merge_close_forbids_any)."""
    r = g.random
    pages = r.choice((3, 4, 6, 8))
    at = g.spot(pages)
    cut = r.randint(1, pages - 2)
    return [
        Op("shmat", g.proc, g.name("s"), g.at(at), pages * PAGE_SIZE, 3, ops.SHMAT_WORDS["remap"]),
        g.on("mprotect", at, cut, prot=1),
        g.on("mprotect", at + cut * PAGE_SIZE, r.randint(1, pages - cut), prot=1),
        *([g.on("write", at, pages)] if r.random() < 0.5 else []),
    ]


def move_locked(g: Ground) -> list[Op]:
    """MREMAP_DONTUNMAP of a part of a locked mapping (dontunmap_pre_split, dontunmap_locks_twice)."""
    r = g.random
    if not g.locks:
        return []
    pages = r.choice((2, 3, 4, 6))
    at = g.spot(pages)
    first = r.randrange(pages)
    count = r.randint(1, pages - first)
    return [
        g.map(at, pages),
        g.on("mlock", at, pages),
        g.move(at + first * PAGE_SIZE, count, g.spot(count), 7),
    ]


def between(g: Ground) -> list[Op]:
    """A mapping between two of its kind that have anon_vmas of their own (mmap_merges_right_first)."""
    r = g.random
    a, b, c = (r.randint(1, 3) for _ in range(3))
    at = g.spot(a + b + c)
    middle, right = at + a * PAGE_SIZE, at + (a + b) * PAGE_SIZE
    ends = [(g.map(at, a), g.on("write", at, 1)), (g.map(right, c), g.on("write", right, 1))]
    r.shuffle(ends)
    return [g.on("munmap", middle, b), *(op for pair in ends for op in pair), g.map(middle, b)]


def locked_replaced(g: Ground) -> list[Op]:
    """A mapping over part of another that a limit refuses (mmap_gathers_first)."""
    r = g.random
    pages = r.choice((4, 6, 8))
    at = g.spot(2 * pages)
    resource = ops.RLIMIT_WORDS[r.choice(("data", "as"))]
    return [
        g.map(at, pages),
        Op("rlimit", g.proc, length=PAGE_SIZE, flags=resource),
        g.map(at + r.randint(1, pages - 1) * PAGE_SIZE, r.choice((1, 2, pages)), 3),
        Op("rlimit", g.proc, length=ops.UNLIMITED, flags=resource),
    ]


def lent(g: Ground) -> list[Op]:
    """A child of vfork acts in the address space of its caller, then leaves it."""
    r = g.random
    if not g.room:
        return []
    child = g.name("p")
    pages = r.choice((1, 2, 4, 8))
    at = g.spot(pages)
    steps = [
        Op("mmap", child, g.name("m"), g.at(at), pages * PAGE_SIZE, 3, ANON),
        Op("write", child, place=g.at(at), length=r.randint(1, pages) * PAGE_SIZE),
        Op("madvise", child, place=g.at(at), length=PAGE_SIZE, flags=ops.ADVICE_WORDS["dontneed"]),
        Op("munmap", child, place=g.at(at), length=PAGE_SIZE),
    ]
    first = r.randrange(len(steps))
    steps = steps[first : first + r.randint(0, 3)]
    gone = "execve" if g.calm and r.random() < 0.5 else "exit"
    after = [Op("exit", child)] if gone == "execve" and r.random() < 0.5 else []
    return [Op("vfork", g.proc, child), *steps, Op(gone, child), g.on("write", at, pages), *after]


def hole(g: Ground) -> list[Op]:
    """Populating from one mapping over a hole into the next (populate_stops_at_hole)."""
    r = g.random
    low, gap, high = (r.randint(1, 4) for _ in range(3))
    at = g.spot(low + gap + high)
    word = r.choice(("populate_read", "populate_write"))
    return [
        g.on("munmap", at, low + gap + high),
        g.map(at, low),
        g.map(at + (low + gap) * PAGE_SIZE, high),
        g.on("madvise", at, low + gap + high, flags=ops.ADVICE_WORDS[word]),
    ]


def file_guard(g: Ground) -> list[Op]:
    """Guard pages in a mapping of a file (guard_file)."""
    r = g.random
    if not g.files:
        return []
    pages = r.choice((2, 4, 8))
    at = g.spot(pages)
    kind = r.choice((ops.SHARED, ops.PRIVATE)) | ops.FIXED
    first = r.randrange(pages)
    mapped = Op("mmap", g.proc, g.name("m"), g.at(at), pages * PAGE_SIZE, 3, kind, file=r.choice(g.files))
    guard = at + first * PAGE_SIZE, r.randint(1, pages - first)
    return [
        mapped,
        g.on("madvise", *guard, flags=ops.ADVICE_WORDS["guard_install"]),
        g.on("read", at, pages),
        *([g.on("madvise", *guard, flags=ops.ADVICE_WORDS["guard_remove"])] if r.random() < 0.3 else []),
    ]


def huge(g: Ground) -> list[Op]:
    """Whole huge pages, placed by the kernel (thp_align_anon)."""
    length = g.random.choice((1, 1, 2)) * HPAGE_SIZE
    return [Op("mmap", g.proc, g.name("m"), None, length, 3, ANON & ~ops.FIXED)]


def lock_on_fault(g: Ground) -> list[Op]:
    """Pages that are locked as they come (smaps_lockonfault)."""
    r = g.random
    if not g.locks:
        return []
    pages = r.choice((2, 3, 6))
    at = g.spot(pages)
    return [g.map(at, pages), g.on("mlock2", at, pages, flags=1), g.on("write", at, r.randint(1, pages))]


def source_again(g: Ground) -> list[Op]:
    """MREMAP_DONTUNMAP of the unfaulted end of a mapping, to where it ends (dontunmap_self_merge)."""
    r = g.random
    pages = r.choice((3, 4, 6))
    at = g.spot(3 * pages)
    count = r.randint(1, pages - 1)
    end = at + pages * PAGE_SIZE
    return [
        g.on("munmap", at, 3 * pages),
        g.map(at, pages),
        g.move(end - count * PAGE_SIZE, count, end + r.choice((0, 0, 1)) * PAGE_SIZE, 7),
    ]


def emptied_source(g: Ground) -> list[Op]:
    """A neighbour of what MREMAP_DONTUNMAP of a moved mapping left empty (dontunmap_resets_pgoff)."""
    r = g.random
    pages = r.choice((1, 1, 2, 3))
    size = pages * PAGE_SIZE
    first, second, third = (g.spot(2 * pages) for _ in range(3))
    return [
        g.map(first, pages),
        g.on("write", first, pages),
        g.on("munmap", second, 2 * pages),
        g.move(first, pages, second, 3),
        g.move(second, pages, third, 7),
        g.map(second + size, pages),
    ]


def unfaulted_target(g: Ground) -> list[Op]:
    """A written mapping made equal to its unwritten neighbour (merge_unfaulted_target)."""
    r = g.random
    low, high = r.randint(1, 3), r.randint(1, 3)
    at = g.spot(low + high)
    end = at + low * PAGE_SIZE
    written = (end, high) if r.random() < 0.5 else (at, low)
    return [
        g.map(at, low, 3 if written[0] == end else 7),
        g.map(end, high, 7 if written[0] == end else 3),
        g.on("write", *written),
        g.on("mprotect", *written, prot=3),
    ]


def validated(g: Ground) -> list[Op]:
    """A file's mapping whose flags are looked at (above4g_is_known)."""
    r = g.random
    if not g.files:
        return []
    pages = r.choice((1, 2, 4))
    flags = ops.SHARED | ops.PRIVATE | ops.FIXED | r.choice((0, 0x80, 0x80, 0x80, 1 << r.randint(6, 30)))
    at = g.spot(pages)
    return [Op("mmap", g.proc, g.name("m"), g.at(at), pages * PAGE_SIZE, 3, flags, file=r.choice(g.files))]


def cleaned(g: Ground) -> list[Op]:
    """Pages that MADV_FREE cleaned, given other rights, then written again (mprotect_wants_dirty)."""
    r = g.random
    pages = r.choice((1, 2, 4))
    at = g.spot(pages)
    through = r.choice((1, 5, 7))
    return [
        g.map(at, pages),
        g.on("write", at, pages),
        g.on("madvise", at, r.randint(1, pages), flags=ops.ADVICE_WORDS["free"]),
        g.on("mprotect", at, pages, prot=through),
        *([g.on("mprotect", at, pages, prot=r.choice((3, 7)))] if through != 7 else []),
        g.on("write", at, pages),
    ]


def written_back(g: Ground) -> list[Op]:
    """Pages of a file on disk, shared: clean pages fault at each first write (page_mkwrite), and are clean after msync
    (folio_mkclean)."""
    r = g.random
    if not g.disks:
        return []
    pages = r.choice((2, 4, 8))
    at = g.spot(pages)
    offset = r.choice((0, 0, 1, 3)) * PAGE_SIZE
    flags = ops.SHARED | ops.FIXED
    size = pages * PAGE_SIZE
    file = r.choice(list(g.disks))
    child = g.name("p") if g.room and r.random() < 0.3 else ""
    return [
        Op("mmap", g.proc, g.name("m"), g.at(at), size, 3, flags, file=file, offset=offset),
        g.on(r.choice(("read", "write")), at, r.randint(1, pages)),
        g.on("write", at, r.randint(1, pages)),
        *([Op("fork", g.proc, child)] if child else []),
        g.on("msync", at, r.randint(1, pages), flags=r.choice((4, 4, 4, 1, 6))),
        *(
            [g.on("mprotect", at, pages, prot=1), g.on("mprotect", at, pages, prot=3)]
            if r.random() < 0.4
            else []
        ),
        Op("write", child or g.proc, place=g.at(at), length=r.randint(1, pages) * PAGE_SIZE),
    ]


def last_page(g: Ground) -> list[Op]:
    """A read beyond the end of a file on disk, whose last page is the first around it, where no table is
    (last_page_needs_table)."""
    r = g.random
    if not g.disks:
        return []
    file, size = r.choice(list(g.disks.items()))
    start = FAR_TABLES + (2048 + r.randrange(8)) * HPAGE_SIZE
    at = start + r.choice((0, 16, 32, 496)) * PAGE_SIZE
    kind = r.choice((ops.SHARED, ops.PRIVATE)) | ops.FIXED
    offset = max(0, size - r.choice((1, 1, 1, 2, 17))) * PAGE_SIZE
    return [
        g.on("munmap", start, HPAGE_PAGES),
        Op(
            "mmap",
            g.proc,
            g.name("m"),
            g.at(at),
            8 * PAGE_SIZE,
            r.choice((1, 3)),
            kind,
            file=file,
            offset=offset,
        ),
        g.on(r.choice(("read", "read", "write")), at + r.randint(1, 3) * PAGE_SIZE, 1),
        *([g.on("read", at, 1)] if r.random() < 0.4 else []),
        *([g.on("munmap", at, 8)] if r.random() < 0.7 else []),
    ]


def dirty_neighbour(g: Ground) -> list[Op]:
    """A soft-dirty area and one that is not become one by mprotect (sticky_softdirty)."""
    r = g.random
    low, high = r.choice((1, 2, 3)), r.choice((1, 2, 3))
    at = g.spot(low + high)
    middle = at + low * PAGE_SIZE
    areas = [(at, low), (middle, high)]
    r.shuffle(areas)
    return [
        g.on("munmap", at - PAGE_SIZE, low + high + 2),
        g.map(*areas[0], 7),
        Op("clear_refs", g.proc, flags=4),
        g.map(*areas[1], 3),
        g.on("mprotect", *areas[0], prot=3),
    ]


# With their weights.
RECIPES: dict[str, tuple[Callable[[Ground], list[Op]], float]] = {
    "realign": (realign, 2.2),
    "heap neighbour": (heap_neighbour, 3.2),
    "empty table": (empty_table, 2),
    "close hook": (close_hook, 2),
    "move locked": (move_locked, 3),
    "between": (between, 0.9),
    "replaced under a limit": (locked_replaced, 0.5),
    "at a limit": (at_a_limit, 1.6),
    "lent": (lent, 1.2),
    "hole": (hole, 0.8),
    "file guard": (file_guard, 2),
    "huge": (huge, 0.6),
    "lock on fault": (lock_on_fault, 1.4),
    "source again": (source_again, 0.7),
    "emptied source": (emptied_source, 0.6),
    "unfaulted target": (unfaulted_target, 0.6),
    "cleaned": (cleaned, 0.7),
    "validated": (validated, 7.5),
    "written back": (written_back, 4),
    "last page": (last_page, 3),
    "dirty neighbour": (dirty_neighbour, 1),
}
