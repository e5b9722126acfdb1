"""Agreement: the share of what was compared on which model and kernel agree, beside that of a trivial
predictor.

A high share alone says little: most pages do not change in most steps. So each kind is counted twice: for the
model, and for a predictor that knows nothing but "nothing changes" (vmas and pages stay as they were, a call
succeeds and takes no fault, an access takes one fault a page and no signal). What the model is worth is the
difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("results", "faults", "signals", "vmas", "pages", "frames", "accounting")


@dataclass(slots=True)
class Share:
    """Counts of one kind: compared, agreed by the model, agreed by the trivial predictor (None: has none)."""

    total: int = 0
    agreed: int = 0
    trivial: int | None = 0

    @property
    def share(self) -> float:
        """0 to 1; 1 only if everything agreed."""
        return self.agreed / self.total if self.total else 1.0

    @property
    def trivial_share(self) -> float | None:
        """That of the trivial predictor."""
        return None if self.trivial is None else (self.trivial / self.total if self.total else 1.0)


@dataclass(slots=True)
class Agreement:
    """Shares by kind, and how far the program went."""

    kinds: dict[str, Share] = field(default_factory=lambda: {kind: Share() for kind in KINDS})
    operations: int = 0
    succeeded: int = 0

    def count(self, kind: str, agreed: int, trivial: int | None, total: int) -> None:
        """Add to one kind."""
        share = self.kinds[kind]
        share.total += total
        share.agreed += agreed
        if trivial is None:
            share.trivial = None
        elif share.trivial is not None:
            share.trivial += trivial

    def add(self, other: Agreement) -> None:
        """Add the counts of another program."""
        self.operations += other.operations
        self.succeeded += other.succeeded
        for kind, share in other.kinds.items():
            self.count(kind, share.agreed, share.trivial, share.total)

    def rows(self) -> list[dict[str, object]]:
        """One row a kind, for printing and for JSON."""
        return [
            {
                "kind": kind,
                "compared": s.total,
                "disagree": s.total - s.agreed,
                "share": s.share,
                "trivial_share": s.trivial_share,
            }
            for kind, s in self.kinds.items()
        ]

    def text(self) -> str:
        """Lines for people. A share below 1 never prints as 100 %."""
        lines = []
        for kind, s in self.kinds.items():
            trivial = "-" if s.trivial_share is None else percent(s.trivial_share)
            lines.append(
                f"{kind:<11} {s.total:>12,} compared  {s.total - s.agreed:>6,} disagree"
                f"  agreement {percent(s.share):>9}  (predicting no change: {trivial})"
            )
        return "\n".join(lines)


def percent(share: float) -> str:
    """ "99.98 %", rounded down, so that 100 % means all."""
    return "100 %" if share >= 1 else f"{int(share * 10000) / 100:.2f} %"
