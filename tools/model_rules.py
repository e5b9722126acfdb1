"""Writes docs/reference/model-rules.md: each rule of the model's profiles with its kernel function.

    python tools/model_rules.py          writes it
    python tools/model_rules.py --check  exit 1 if it is not what it would write

The text is the comment beside the rule in src/pagelens/model/profile.py, so the two cannot drift apart.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
TARGET = ROOT / "docs" / "reference" / "model-rules.md"


def comments() -> dict[str, str]:
    """rule -> the comment above it."""
    text = (ROOT / "src" / "pagelens" / "model" / "profile.py").read_text()
    out: dict[str, str] = {}
    collected: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"    # (?!-- )(.*)", line):
            collected.append(found[1])
        elif found := re.match(r"    (\w+): bool = ", line):
            out[found[1]] = " ".join(collected)
            collected = []
        else:
            collected = []
    return out


def table() -> str:
    """The page."""
    from pagelens.model.profile import PROFILES, Profile

    text = comments()
    names = list(PROFILES)
    lines = [
        "# Rules of the model's profiles",
        "",
        "Made by `python tools/model_rules.py` from `src/pagelens/model/profile.py`. One row is one rule on which",
        "kernels differ, with the kernel function that it mirrors and the version in which it changed.",
        "`Profile.with_rules(RULE=…)` makes a variant; `pagelens model verify` finds by probing which hold here.",
        "",
        f"| rule | {' | '.join(n.removeprefix('linux-') for n in names)} | what, where, since when |",
        f"| --- | {' | '.join('---' for _ in names)} | --- |",
    ]
    for rule in Profile.rules():
        values = " | ".join("yes" if getattr(PROFILES[n], rule) else "no" for n in names)
        what = text.get(rule, "").replace("|", r"\|")
        lines.append(f"| `{rule}` | {values} | {what} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check."""
    page = table()
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.exists() and TARGET.read_text() == page else 1
    TARGET.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
