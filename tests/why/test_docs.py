"""docs/causes.md has a place for every verdict that refers to it."""

from __future__ import annotations

from pathlib import Path

from pagelens.why.causes import ALL

DOC = Path(__file__).parents[2] / "docs/causes.md"


def test_every_cause_is_explained_where_its_link_points() -> None:
    headings = {line[4:] for line in DOC.read_text().splitlines() if line.startswith("### ")}
    assert headings == {rule.slug for rule in ALL} | {"ambiguous", "unknown"}
    assert all(rule.doc == f"docs/causes.md#{rule.slug}" for rule in ALL)
