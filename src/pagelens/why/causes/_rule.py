"""What a cause is: a slug, words for people, and a pure function of one `Evidence`.

Rules do not know each other and have no order. Where two hold, the verdict is `ambiguous` with both as
candidates; where none holds it is `unknown`. So a rule that claims too much shows up as ambiguity, not as a
wrong answer that happened to come first. Rejected: a decision tree (its order hides what the evidence does
not decide).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pagelens.why.evidence import Area, Evidence, Forked, Gone, Guarded, Huge, Mark, Prior, Race
from pagelens.why.verdict import CERTAIN


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule holds: how surely, and by what (one sentence)."""

    why: str
    confidence: str = CERTAIN


@dataclass(frozen=True, slots=True)
class Rule:
    """One cause."""

    slug: str
    title: str
    remedy: str
    holds: Callable[[Evidence], Finding | None]

    @property
    def doc(self) -> str:
        """Where the cause is explained."""
        return f"docs/causes.md#{self.slug}"


def ordinary(e: Evidence) -> bool:
    """Completed, and neither a handler in user space nor another thread's fault did the work."""
    raced = e.race is Race.THREAD or overtaken(e)
    return not e.failed and not e.uffd and not raced and e.area is not Area.UNSEEN


def overtaken(e: Evidence) -> bool:
    """Another thread's fault had just mapped the page, and nothing that is known took it away since."""
    there = e.race is Race.LATE and e.prior not in (Prior.NONE, Prior.SWAPPED)
    mine = not (e.write and private(e)) or e.prior is Prior.ANON
    gone = e.dropped or e.mark is not Mark.NONE or e.major or e.huge is Huge.MADE
    return there and mine and not gone and not e.present and allowed(e)


def returned(e: Evidence) -> bool:
    """Write to a page that had been written and was gone, and that the fault before this one brought back read-only."""
    own = e.area is Area.SHMEM or (private(e) and e.prior is Prior.ANON and e.forked is Forked.NONE)
    back = e.present and e.guarded in (Guarded.BACK, Guarded.BACK_DISK)
    return ordinary(e) and own and back and e.write and not e.rearmed


def fresh(e: Evidence) -> bool:
    """Nothing had taken the page away, as far as evidence goes: it may not have been mapped before."""
    return Gone.FRESH in e.gone if e.gone else not e.dropped and e.mark is Mark.NONE


def private(e: Evidence) -> bool:
    """In a private mapping, where a write makes the page one's own."""
    return e.area in (Area.ANON, Area.FILE)


def allowed(e: Evidence) -> bool:
    """The vma's rights permit the access."""
    if e.write:
        return e.writable
    if e.exec:
        return e.executable
    return e.readable or e.executable or e.writable
