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
from pagelens.model.world import Names, World
from pagelens.proof.agreement import Agreement
from pagelens.vm.accounting import Accounting
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Vma, VmaList

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
    # The last look at a process, for the trivial predictor.
    vmas: VmaList
    spans: list[tuple[int, int]] = field(default_factory=list)
    windows: dict[int, U64] = field(default_factory=dict)


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
        if op.name in ("exit", "memfd"):
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
        real, ours = self.kernel.vmas(proc), self.model.vmas(proc)
        before = self._before.get(proc)
        total = max(len(real), len(ours), 1)
        missing: list[Vma] = []
        extra: list[Vma] = []
        if not _same(real, ours):
            here, there = set(map(key_of, real)), set(map(key_of, ours))
            missing = [v for v in real if key_of(v) not in there]
            extra = [v for v in ours if key_of(v) not in here]
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
            now.spans = before.spans if before is not None and before.vmas is real else windows(real)
        for start, pages in now.spans:
            entries = self.kernel.pagemap(proc, start, pages) & self.mask
            models = self.model.pagemap(proc, start, pages) & self.mask
            now.windows[start] = entries
            odd = entries != models
            wrong = int(np.count_nonzero(odd))
            was = before.windows.get(start) if before else None
            stayed = 0
            if was is not None:
                n = min(len(was), pages)
                stayed = int(np.count_nonzero(was[:n] == entries[:n]))
            self.agreement.count("pages", pages - wrong, stayed, pages)
            if wrong:
                first = int(odd.argmax())
                found.append(
                    self._differs(
                        "pages", op, proc, f"page {start + first * PAGE_SIZE:#x} ({wrong} differ)",
                        bits_text(int(entries[first])), bits_text(int(models[first])),
                    )
                )  # fmt: skip
        self._before[proc] = now

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
        rows = {v.start: i for i, v in enumerate(ours)}
        columns = {
            f: (real.column(f).tolist(), model.column(f).tolist()) for f in real.fields if f in model.fields
        }
        harness = {start for start, _ in self.kernel.setting.harness}
        fields = [f for f in real.fields if f in model.fields and f not in LEFT_OUT]
        # A field of its own on one side (6.1 has no KSM:) is one disagreement.
        odd_fields = set(real.fields) ^ set(model.fields)
        compared, wrong = 1, int(bool(odd_fields))
        if odd_fields:
            names = " ".join(sorted(odd_fields))
            here, there = (names if odd_fields & set(f) else "-" for f in (real.fields, model.fields))
            found.append(self._differs("accounting", None, proc, "fields of smaps", here, there))
        assert real.per_vma is not None
        assert model.per_vma is not None
        for i, vma in enumerate(vmas):
            if vma.start in harness or vma.start not in rows:
                continue
            row = rows[vma.start]
            for f in fields:
                a, b = columns[f][0][i], columns[f][1][row]
                compared += 1
                if a != b:
                    wrong += 1
                    subject = f"{f} of {vma}"
                    found.append(self._differs("accounting", None, proc, subject, f"{a} B", f"{b} B"))
            flags, theirs = vma.vm_flags, ours[row].vm_flags
            if flags is not None and theirs is not None:
                compared += 1
                odd = flags ^ theirs
                if not self.soft_dirty:
                    odd -= {"sd"}
                if odd:
                    wrong += 1
                    kernel, text = " ".join(sorted(flags & odd)), " ".join(sorted(theirs & odd))
                    subject = f"VmFlags of {vma}"
                    found.append(self._differs("accounting", None, proc, subject, kernel or "-", text or "-"))
        self._status(proc, real.status, model.status, found)
        self.agreement.count("accounting", compared - wrong, None, compared)


def _same(real: VmaList, ours: VmaList) -> bool:
    # Field by field: most lists are equal, and tuples for all of them cost more than the look itself.
    return len(real) == len(ours) and all(
        a.start == b.start
        and a.end == b.end
        and a.prot == b.prot
        and a.shared == b.shared
        and a.offset == b.offset
        and a.name == b.name
        for a, b in zip(real, ours, strict=True)
    )


def _stayed(before: _Before | None, real: VmaList, total: int) -> int:
    # What predicting no change gets right. A world gives the same object for the same line of maps.
    if before is None:
        return max(total - len(real), 0)
    if before.vmas is real:
        return total
    return max(total - len(set(map(id, before.vmas)) ^ set(map(id, real))), 0)


def key_of(vma: Vma) -> tuple[object, ...]:
    """What of a vma is compared: all of maps but device and inode numbers."""
    return (vma.start, vma.end, int(vma.prot), vma.shared, vma.offset, vma.name)


def vma_text(vma: Vma) -> str:
    """A vma in one short piece."""
    at = f" @{vma.offset:#x}" if vma.name.startswith("/") else ""
    return f"{vma}{at}"


def windows(vmas: Iterable[Vma]) -> list[tuple[int, int]]:
    """Spans (address, pages) that cover all vmas: near ones together, so that few reads do; of very large
    ones only the two ends."""
    spans: list[list[int]] = []
    for vma in sorted(vmas, key=lambda v: v.start):
        if spans and vma.start <= spans[-1][1] + 512 * PAGE_SIZE:
            spans[-1][1] = max(spans[-1][1], vma.end)
        else:
            spans.append([vma.start, vma.end])
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
