"""How often each rule of a profile was asked for: a rule that no program reaches is not proven by any.

The model asks for a rule last, behind all else that must hold for it to matter, so that asking is reaching.
Rejected: running each program with every rule inverted (thirty times the work; tests do that by rule).
"""

from __future__ import annotations

from collections import Counter
from typing import cast

from pagelens.model.profile import Profile

# Asked for with every look or every address space, whatever happens there: a count would say nothing.
_ALWAYS = frozenset({"soft_dirty", "sticky_softdirty", "smaps_ksm", "status_rss_lags"})
RULES = tuple(rule for rule in Profile.rules() if rule not in _ALWAYS)
_COUNTED = frozenset(RULES)


class Counted:
    """A profile that counts in `reached` which of RULES was asked for."""

    def __init__(self, profile: Profile, reached: Counter[str]) -> None:
        self._profile = profile
        self._reached = reached
        for rule in _ALWAYS:  # found before __getattr__ is asked
            setattr(self, rule, getattr(profile, rule))

    def __getattr__(self, name: str) -> object:
        if name in _COUNTED:
            self._reached[name] += 1
        return getattr(self._profile, name)


def counted(profile: Profile, reached: Counter[str]) -> Profile:
    """`profile`, counting."""
    return cast("Profile", Counted(profile, reached))
