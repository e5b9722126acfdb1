"""What is compared at checkpoints: smaps with VmFlags, smaps_rollup, status, statm, and the frames behind the pages.

The files under /proc that sum up cost a millisecond to make and to read, so `compare` looks at them after each
hundredth operation only. Frames are compared up to renaming (which frame is free is no rule): what is one frame
here must be one frame there, in all processes together, with the same map count and flags. That needs
CAP_SYS_ADMIN and is left out without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pagelens.model.op import Op
from pagelens.model.world import U64, Key, Span, World
from pagelens.proof.agreement import Agreement
from pagelens.vm.accounting import Accounting
from pagelens.vm.units import PAGE_SHIFT, PAGE_SIZE
from pagelens.vm.vma import VmaList

# Referenced: PG_referenced is the LRU's (mm/swap.c folio_mark_accessed). LazyFree: a page counts only once a
# per-CPU batch of up to 31 is drained (mm/swap.c folio_mark_lazyfree). docs/fidelity.md has the seeds. The huge page
# fields are 0 behind the fence.
LEFT_OUT = frozenset({"Referenced", "LazyFree"})
RSS_FIELDS = ("VmRSS", "RssAnon", "RssFile", "RssShmem")
STATUS_FIELDS = (
    "VmPeak", "VmSize", "VmLck", "VmPin", "VmData", "VmStk", "VmExe", "VmLib", "VmPTE", "VmSwap", *RSS_FIELDS
)  # fmt: skip
STATM_FIELDS = ("size", "resident", "shared", "text", "lib", "data", "dt")
# Of kpageflags, what is a rule: the others are the LRU's, or change with its per-CPU batches.
KPF_UPTODATE, KPF_DIRTY, KPF_MMAP, KPF_ANON, KPF_SWAPBACKED, KPF_ZERO_PAGE = (
    np.uint64(1 << bit) for bit in (3, 4, 11, 12, 14, 24)
)
KPF_COMPARED = np.uint64(KPF_UPTODATE | KPF_DIRTY | KPF_MMAP | KPF_ANON | KPF_SWAPBACKED | KPF_ZERO_PAGE)
FRAME = np.uint64((1 << 55) - 1)
_PRESENT = np.uint64(63)
_BLOCK = 1 << 18  # pages that are looked at in one piece: 2 MiB of pagemap, of 1 GiB of addresses


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One thing on which kernel and model differ, after operation `index` (from 0)."""

    kind: str
    index: int
    op: Op | None
    proc: str
    subject: str
    kernel: str
    model: str

    def __str__(self) -> str:
        return (
            f"after operation {self.index + 1} ({self.op}): {self.proc}: {self.subject}:"
            f" kernel {self.kernel}, model {self.model}"
        )


def windows(keys: Iterable[Key]) -> list[Span]:
    """Spans (address, pages) that cover all vmas: near ones together, so that few reads do."""
    spans: list[list[int]] = []
    last = -1
    for start, end, *_ in sorted(keys):
        if start <= last:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
        last = spans[-1][1] + 512 * PAGE_SIZE
    return [(start, (end - start) // PAGE_SIZE) for start, end in spans]


def blocks(spans: list[Span]) -> Iterator[list[Span]]:
    """The same spans, in pieces that fit into memory: all at once, unless a program maps gigabytes."""
    if sum(pages for _, pages in spans) <= _BLOCK:
        yield spans
        return
    for start, pages in spans:
        for at in range(0, pages, _BLOCK):
            yield [(start + at * PAGE_SIZE, min(_BLOCK, pages - at))]


class Checks:
    """One look at both worlds. index: of the operation before."""

    def __init__(
        self, kernel: World, model: World, soft_dirty: bool, agreement: Agreement, index: int
    ) -> None:
        self.kernel = kernel
        self.model = model
        self.soft_dirty = soft_dirty
        self.agreement = agreement
        self.index = index
        self.found: list[Disagreement] = []

    def everything(self) -> list[Disagreement]:
        """All that there is."""
        self._frames()
        for proc in self._leaders():
            vmas, real = self.kernel.accounting(proc)
            ours, model = self.model.accounting(proc)
            self._fields(proc, real, model)
            self._rows(proc, vmas, real, ours, model)
            self._status(proc, real.status, model.status)
            self._rollup(proc)
            self._statm(proc)
        return self.found

    def status(self) -> list[Disagreement]:
        """status alone."""
        for proc in self._leaders():
            self._status(proc, self.kernel.status(proc), self.model.status(proc))
        return self.found

    def _leaders(self) -> Iterator[str]:
        return (proc for proc in list(self.kernel.alive()) if self.kernel.is_leader(proc))

    def _differs(self, proc: str, subject: str, kernel: str, model: str, kind: str = "accounting") -> None:
        self.found.append(Disagreement(kind, self.index, None, proc, subject, kernel, model))

    def _figures(self, proc: str, where: str, unit: str, real: dict[str, int], ours: dict[str, int]) -> None:
        # The figures that both have.
        both = real.keys() & ours.keys()
        wrong = sorted(name for name in both if real[name] != ours[name])
        for name in wrong:
            self._differs(proc, f"{name} of {where}", f"{real[name]}{unit}", f"{ours[name]}{unit}")
        self.agreement.count("accounting", len(both) - len(wrong), None, len(both))

    @property
    def _exact(self) -> bool:
        # Whether counters of pages can be compared: the child saw them exact, and the profile does not say otherwise.
        return self.kernel.setting.rss_exact and self.model.setting.rss_exact

    def _status(self, proc: str, real: dict[str, int], ours: dict[str, int]) -> None:
        wanted = [f for f in STATUS_FIELDS if self._exact or f not in RSS_FIELDS]
        self._figures(proc, "status", " B", {f: real[f] for f in wanted if f in real}, ours)

    def _rollup(self, proc: str) -> None:
        real, ours = (world.rollup(proc) for world in (self.kernel, self.model))
        kept = {f: v for f, v in real.items() if f not in LEFT_OUT}
        self._figures(proc, "smaps_rollup", " B", kept, ours)

    def _statm(self, proc: str) -> None:
        real, ours = (
            dict(zip(STATM_FIELDS, world.statm(proc), strict=True)) for world in (self.kernel, self.model)
        )
        if not self._exact:
            del real["resident"], real["shared"]
        self._figures(proc, "statm", " pages", real, ours)

    def _fields(self, proc: str, real: Accounting, ours: Accounting) -> None:
        # A field of its own on one side (6.1 has no KSM:) is one disagreement.
        odd = set(real.fields) ^ set(ours.fields)
        if odd:
            names = " ".join(sorted(odd))
            here, there = (names if odd & set(f) else "-" for f in (real.fields, ours.fields))
            self._differs(proc, "fields of smaps", here, there)
        self.agreement.count("accounting", not odd, None, 1)

    def _rows(self, proc: str, vmas: VmaList, real: Accounting, ours: VmaList, model: Accounting) -> None:
        # smaps of each vma that both have.
        assert real.per_vma is not None
        assert model.per_vma is not None
        rows = {v.start: i for i, v in enumerate(ours)}
        harness = {start for start, _ in self.kernel.setting.harness}
        pairs = [(i, rows[v.start]) for i, v in enumerate(vmas) if v.start in rows and v.start not in harness]
        fields = [f for f in real.fields if f in model.fields and f not in LEFT_OUT]
        here = real.per_vma[[i for i, _ in pairs]][:, [real.fields.index(f) for f in fields]]
        there = model.per_vma[[row for _, row in pairs]][:, [model.fields.index(f) for f in fields]]
        compared = here.size
        wrong = np.argwhere(here != there).tolist()
        for at, column in wrong:
            subject = f"{fields[column]} of {vmas[pairs[at][0]]}"
            self._differs(proc, subject, f"{here[at, column]} B", f"{there[at, column]} B")
        odd = 0
        for i, row in pairs:
            flags, codes = vmas[i].vm_flags, ours[row].vm_flags
            if flags is None or codes is None:
                continue
            compared += 1
            differ = flags ^ codes
            if differ and not self.soft_dirty:
                differ -= {"sd"}
            if differ:
                odd += 1
                kernel, text = " ".join(sorted(flags & differ)), " ".join(sorted(codes & differ))
                self._differs(proc, f"VmFlags of {vmas[i]}", kernel or "-", text or "-")
        self.agreement.count("accounting", compared - len(wrong) - odd, None, compared)

    def _frames(self) -> None:
        parts = []
        for proc in self._leaders():
            for spans in blocks(windows(self.kernel.keys(proc))):
                here, there = (world.pages(proc, spans) for world in (self.kernel, self.model))
                index = ((here & there) >> _PRESENT).nonzero()[0]
                parts.append((proc, spans, index, here[index] & FRAME, there[index] & FRAME))
        if not parts:
            return
        pfns, frames = (np.concatenate([part[side] for part in parts]) for side in (3, 4))
        if not pfns.any():
            return  # hidden from this user
        wrong = _renamed(pfns, frames) | _renamed(frames, pfns)
        (here_count, here_flags), (there_count, there_flags) = (
            self.kernel.kpage(pfns),
            self.model.kpage(frames),
        )
        odd = (here_flags ^ there_flags) & KPF_COMPARED
        # MADV_FREE takes the bit away once a batch is drained, as with LazyFree: the kernel may still have it.
        odd[(there_flags & (KPF_ANON | KPF_SWAPBACKED)) == KPF_ANON] &= ~np.uint64(KPF_SWAPBACKED)
        wrong |= (here_count != there_count) | (odd != 0)
        total = int(np.count_nonzero(wrong))
        self.agreement.count("frames", len(pfns) - total, None, len(pfns))
        if not total:
            return
        first = int(wrong.argmax())
        kernel, model = (
            f"{int(count[first])} mappings, flags {int(flags[first] & KPF_COMPARED):#x}"
            for count, flags in ((here_count, here_flags), (there_count, there_flags))
        )
        for proc, spans, index, *_ in parts:
            if first < len(index):
                page = page_at(spans, int(index[first]))
                self._differs(proc, f"frame of page {page:#x} ({total} differ)", kernel, model, "frames")
                return
            first -= len(index)


def _renamed(one: U64, other: U64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    # Where the same number in `one` stands for different numbers in `other`.
    _, first, back = np.unique(one, return_index=True, return_inverse=True)
    wrong: np.ndarray[tuple[int], np.dtype[np.bool_]] = other != other[first][back]
    return wrong


def page_at(spans: Iterable[Span], index: int) -> int:
    """Address of page `index` of the pages of all spans, one after the other."""
    for start, pages in spans:
        if index < pages:
            return start + (index << PAGE_SHIFT)
        index -= pages
    raise IndexError(index)
