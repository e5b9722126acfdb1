"""Model against kernel, after each operation: what it returned, and what the address space looks like.

Both sides are worlds (`model.world.World`); the left one is the kernel. After each operation: return value,
fault count, signal with code and address; the vma list; pagemap of every page of every vma. At checkpoints:
what `proof.checkpoint` says. What is left out is listed in docs/fidelity.md, each with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pagelens.model import op as ops
from pagelens.model.op import Op, Outcome
from pagelens.model.world import U64, Key, Names, Span, World
from pagelens.proof.agreement import Agreement
from pagelens.proof.checkpoint import Checks, Disagreement, blocks, page_at, windows
from pagelens.vm.units import PAGE_SIZE
from pagelens.vm.vma import Prot, Vma

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
        if op.name in ("exit", "execve", "memfd", "disk"):
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
        for spans in blocks(now.spans):
            entries = self.kernel.pages(proc, spans) & self.mask
            models = self.model.pages(proc, spans) & self.mask
            odd = entries != models
            wrong = int(np.count_nonzero(odd))
            total = len(entries)
            stayed = total  # of gigabytes, what was there is not kept: the predictor is taken to be right
            if spans is now.spans:
                now.entries = entries
                stayed = _stayed_pages(before, now)
            self.agreement.count("pages", total - wrong, stayed, total)
            if wrong:
                first = int(odd.argmax())
                where = f"page {page_at(spans, first):#x} ({wrong} differ)"
                kernel, text = bits_text(int(entries[first])), bits_text(int(models[first]))
                found.append(self._differs("pages", op, proc, where, kernel, text))

    def checkpoint(self) -> list[Disagreement]:
        """What is compared only now and then (`proof.checkpoint`), of every process."""
        return self._checks().everything()

    def status(self) -> list[Disagreement]:
        """status of every process: what a checkpoint compares of it, without the vmas."""
        return self._checks().status()

    def _checks(self) -> Checks:
        return Checks(self.kernel, self.model, self.soft_dirty, self.agreement, self.index)


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
    if before.spans and not len(before.entries):
        return len(now.entries)
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


def expected_result(op: Op, names: Names) -> int:
    """What the trivial predictor says: success."""
    if op.name in ops.ACCESSES:
        return op.length // PAGE_SIZE
    if op.name == "pwrite":
        return op.length
    if op.name in ("mmap", "mremap", "brk") and op.place is not None:
        return names.resolve(op.place)
    return 0
