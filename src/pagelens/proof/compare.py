"""Model against kernel, after each operation: what it returned, and what the address space looks like.

Both sides are worlds (`model.world.World`); the left one is the kernel. After each operation: return value,
fault count, signal with code and address; the vma list; pagemap of every page of every vma. At checkpoints:
smaps with VmFlags, and status. What is left out is listed in docs/fidelity.md, each with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pagelens.model import op as ops
from pagelens.model.op import Op, Outcome
from pagelens.model.world import Key, Names, Span, World
from pagelens.proof.agreement import Agreement
from pagelens.vm.accounting import Accounting
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Prot, Vma, VmaList

U64 = npt.NDArray[np.uint64]

# Bits of pagemap that are compared: present, swap, file, guard, uffd-wp, exclusive; soft-dirty (55) where the
# kernel has it. Frame numbers are not: which frame is free is no rule.
PRESENT, SWAP, FILE, GUARD, UFFD_WP, EXCLUSIVE, SOFT_DIRTY = (1 << b for b in (63, 62, 61, 58, 57, 56, 55))
COMPARED = PRESENT | SWAP | FILE | GUARD | UFFD_WP | EXCLUSIVE
BIT_NAMES = {
    PRESENT: "present",
    SWAP: "swapped",
    FILE: "file",
    GUARD: "guard",
    UFFD_WP: "uffd-wp",
    EXCLUSIVE: "exclusive",
    SOFT_DIRTY: "dirty",
}
# Referenced: aged by whoever walks the LRU at any moment (mm/vmscan.c folio_referenced). LazyFree: a page
# counts only once a per-CPU batch of up to 31 is drained (mm/swap.c folio_mark_lazyfree); two identical
# children differ in it (tests/proof/test_oracle.py). The huge page fields are 0 behind the fence.
LEFT_OUT = frozenset({"Referenced", "LazyFree"})
STATUS_FIELDS = (
    "VmSize",
    "VmLck",
    "VmData",
    "VmStk",
    "VmPTE",
    "VmPin",
    "VmSwap",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
)
_MAX_WINDOW = 4096  # pages of one span that are compared: of a larger one, both ends


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


def bits_text(entry: int) -> str:
    """Names of the compared bits of a pagemap entry."""
    return " ".join(name for bit, name in BIT_NAMES.items() if entry & bit) or "absent"


@dataclass(slots=True)
class _Before:
    # The last look at a process: its vmas, the spans of its pages and what was in them.
    keys: list[Key]
    spans: list[Span] = field(default_factory=list)
    entries: U64 = field(default_factory=lambda: np.empty(0, np.uint64))


class Comparison:
    """Runs a program on both sides and keeps what differs. `soft_dirty`: the kernel has it (probe it)."""

    def __init__(self, kernel: World, model: World, *, soft_dirty: bool) -> None:
        self.kernel = kernel
        self.model = model
        self.mask = np.uint64(COMPARED | (SOFT_DIRTY if soft_dirty else 0))
        self.soft_dirty = soft_dirty
        self.agreement = Agreement()
        self.index = -1
        self._before: dict[str, _Before] = {}
        self.outcomes: tuple[Outcome | None, Outcome | None] = (None, None)

    def step(self, op: Op) -> list[Disagreement]:
        """Do one operation on both sides and compare what can be seen. Empty: they agree."""
        self.index += 1
        real, ours = self.outcomes = self.kernel.apply(op), self.model.apply(op)
        found: list[Disagreement] = []
        if real is None or ours is None:
            if real is not ours:
                found.append(self._differs("results", op, op.proc, "operation", str(real), str(ours)))
            return found
        self.agreement.operations += 1
        succeeded = not (real.signal or -4096 < real.result < 0)
        self.agreement.succeeded += succeeded
        if op.name != "exit":
            self._outcome(op, real, ours, found)
        if op.name in ("exit", "execve", "memfd"):
            self._before.pop(op.proc, None)
        # What one process does to shared pages shows in the others (map counts, exclusive), so all are looked
        # at, except after an operation that stays within its own vmas.
        alive = list(self.kernel.alive())
        alone = op.name in ops.LOCAL and op.proc in alive and self.kernel.is_leader(op.proc)
        looked = [op.proc] if alone else alive
        for proc in looked:
            if self.kernel.is_leader(proc):
                self._look(op, proc, found)
        return found

    def _differs(
        self, kind: str, op: Op | None, proc: str, subject: str, kernel: str, model: str
    ) -> Disagreement:
        return Disagreement(kind, self.index, op, proc, subject, kernel, model)

    def _outcome(self, op: Op, real: Outcome, ours: Outcome, found: list[Disagreement]) -> None:
        same = real.result == ours.result
        expected = expected_result(op, self.kernel.names)
        self.agreement.count("results", same, real.result == expected, 1)
        if not same:
            found.append(self._differs("results", op, op.proc, "result", str(real), str(ours)))
        same = real.faults == ours.faults
        guess = op.length // PAGE_SIZE if op.name in ops.ACCESSES else 0
        self.agreement.count("faults", same, real.faults == guess, 1)
        if not same:
            found.append(self._differs("faults", op, op.proc, "faults", str(real.faults), str(ours.faults)))
        same = (real.signal, real.code, real.addr) == (ours.signal, ours.code, ours.addr)
        self.agreement.count("signals", same, not real.signal, 1)
        if not same:
            found.append(self._differs("signals", op, op.proc, "signal", str(real), str(ours)))

    def _look(self, op: Op, proc: str, found: list[Disagreement]) -> None:
        real, ours = self.kernel.keys(proc), self.model.keys(proc)
        before = self._before.get(proc)
        total = max(len(real), len(ours), 1)
        missing: list[Key] = []
        extra: list[Key] = []
        if real != ours:
            here, there = set(real), set(ours)
            missing = [key for key in real if key not in there]
            extra = [key for key in ours if key not in here]
            kernel = ", ".join(map(vma_text, missing)) or "none"
            text = ", ".join(map(vma_text, extra)) or "none"
            found.append(self._differs("vmas", op, proc, "vmas", kernel, text))
        self.agreement.count(
            "vmas", total - max(len(missing), len(extra)), _stayed(before, real, total), total
        )
        now = _Before(real)
        if missing or extra:
            now.spans = windows([*real, *ours])
        else:
            now.spans = before.spans if before is not None and before.keys is real else windows(real)
        self._pages(op, proc, before, now, found)
        self._before[proc] = now

    def _pages(
        self, op: Op, proc: str, before: _Before | None, now: _Before, found: list[Disagreement]
    ) -> None:
        # All spans in one array: numpy's cost a call, not the pages, is what a step pays for.
        now.entries = entries = self.kernel.pages(proc, now.spans)
        entries &= self.mask
        models = self.model.pages(proc, now.spans)
        models &= self.mask
        odd = entries != models
        wrong = int(np.count_nonzero(odd))
        total = len(entries)
        self.agreement.count("pages", total - wrong, _stayed_pages(before, now), total)
        if not wrong:
            return
        first = int(odd.argmax())
        at = first
        for start, pages in now.spans:
            if at < pages:
                where = f"page {start + at * PAGE_SIZE:#x} ({wrong} differ)"
                kernel, text = bits_text(int(entries[first])), bits_text(int(models[first]))
                found.append(self._differs("pages", op, proc, where, kernel, text))
                return
            at -= pages

    def checkpoint(self) -> list[Disagreement]:
        """smaps with VmFlags, and status, of every process."""
        found: list[Disagreement] = []
        for proc in self.kernel.alive():
            if self.kernel.is_leader(proc):
                vmas, real = self.kernel.accounting(proc)
                self._accounting(proc, vmas, real, *self.model.accounting(proc), found)
        return found

    def status(self) -> list[Disagreement]:
        """status of every process: what a checkpoint compares of it, without the vmas."""
        found: list[Disagreement] = []
        for proc in self.kernel.alive():
            if self.kernel.is_leader(proc):
                self._status(proc, self.kernel.status(proc), self.model.status(proc), found)
        return found

    def _status(
        self, proc: str, real: dict[str, int], model: dict[str, int], found: list[Disagreement]
    ) -> None:
        compared = wrong = 0
        for f in STATUS_FIELDS:
            if (f.startswith("Rss") or f == "VmRSS") and not self.kernel.setting.rss_exact:
                continue
            if f in real and f in model:
                compared += 1
                if real[f] != model[f]:
                    wrong += 1
                    kernel, text = f"{real[f]} B", f"{model[f]} B"
                    found.append(self._differs("accounting", None, proc, f"{f} of status", kernel, text))
        self.agreement.count("accounting", compared - wrong, None, compared)

    def _accounting(
        self,
        proc: str,
        vmas: VmaList,
        real: Accounting,
        ours: VmaList,
        model: Accounting,
        found: list[Disagreement],
    ) -> None:
        # A field of its own on one side (6.1 has no KSM:) is one disagreement.
        odd_fields = set(real.fields) ^ set(model.fields)
        compared, wrong = 1, int(bool(odd_fields))
        if odd_fields:
            names = " ".join(sorted(odd_fields))
            here, there = (names if odd_fields & set(f) else "-" for f in (real.fields, model.fields))
            found.append(self._differs("accounting", None, proc, "fields of smaps", here, there))
        assert real.per_vma is not None
        assert model.per_vma is not None
        rows = {v.start: i for i, v in enumerate(ours)}
        harness = {start for start, _ in self.kernel.setting.harness}
        pairs = [(i, rows[v.start]) for i, v in enumerate(vmas) if v.start in rows and v.start not in harness]
        fields = [f for f in real.fields if f in model.fields and f not in LEFT_OUT]
        mine, theirs = (
            table.per_vma[[pair[side] for pair in pairs]][:, [table.fields.index(f) for f in fields]]
            for side, table in enumerate((real, model))
            if table.per_vma is not None
        )
        compared += mine.size
        for at, column in np.argwhere(mine != theirs).tolist():
            wrong += 1
            subject = f"{fields[column]} of {vmas[pairs[at][0]]}"
            kernel, text = f"{mine[at, column]} B", f"{theirs[at, column]} B"
            found.append(self._differs("accounting", None, proc, subject, kernel, text))
        for i, row in pairs:
            vma, flags, codes = vmas[i], vmas[i].vm_flags, ours[row].vm_flags
            if flags is None or codes is None:
                continue
            compared += 1
            odd = flags ^ codes
            if odd and not self.soft_dirty:
                odd -= {"sd"}
            if odd:
                wrong += 1
                kernel, text = " ".join(sorted(flags & odd)), " ".join(sorted(codes & odd))
                subject = f"VmFlags of {vma}"
                found.append(self._differs("accounting", None, proc, subject, kernel or "-", text or "-"))
        self._status(proc, real.status, model.status, found)
        self.agreement.count("accounting", compared - wrong, None, compared)


def _stayed(before: _Before | None, real: list[Key], total: int) -> int:
    # What predicting no change gets right. The kernel's side gives the same object for the same line of maps.
    if before is None:
        return max(total - len(real), 0)
    if before.keys is real:
        return total
    return max(total - len(set(map(id, before.keys)) ^ set(map(id, real))), 0)


def _stayed_pages(before: _Before | None, now: _Before) -> int:
    # The same of pages: those of spans that started where one starts now.
    if before is None:
        return 0
    if before.spans is now.spans:
        return int(np.count_nonzero(before.entries == now.entries))
    was: dict[int, tuple[int, int]] = {}
    at = stayed = 0
    for start, pages in before.spans:
        was[start] = at, pages
        at += pages
    at = 0
    for start, pages in now.spans:
        if start in was:
            old, count = was[start]
            n = min(count, pages)
            stayed += int(np.count_nonzero(before.entries[old : old + n] == now.entries[at : at + n]))
        at += pages
    return stayed


def vma_text(key: Key) -> str:
    """A vma in one short piece."""
    start, end, prot, shared, offset, name = key
    at = f" @{offset:#x}" if name.startswith("/") else ""
    return f"{Vma(start, end, Prot(prot), shared, offset, name=name)}{at}"


def windows(keys: Iterable[Key]) -> list[Span]:
    """Spans (address, pages) that cover all vmas: near ones together, so that few reads do; of very large
    ones only the two ends."""
    spans: list[list[int]] = []
    last = -1
    for start, end, *_ in sorted(keys):
        if start <= last:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
        last = spans[-1][1] + 512 * PAGE_SIZE
    out = []
    for start, end in spans:
        pages = (end - start) // PAGE_SIZE
        if pages <= 2 * _MAX_WINDOW:
            out.append((start, pages))
        else:
            out += [(start, _MAX_WINDOW), (end - _MAX_WINDOW * PAGE_SIZE, _MAX_WINDOW)]
    return out


def expected_result(op: Op, names: Names) -> int:
    """What the trivial predictor says: success."""
    if op.name in ops.ACCESSES:
        return op.length // PAGE_SIZE
    if op.name == "pwrite":
        return op.length
    if op.name in ("mmap", "mremap", "brk") and op.place is not None:
        return names.resolve(op.place)
    return 0
