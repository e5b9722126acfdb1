"""docs/kernels.md is what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from pagelens.linux import probe
from support.facts import EXPECTED

ROOT = Path(__file__).parents[2]


def test_page_is_generated() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/kernels_table.py"), "--check"], check=False)
    assert done.returncode == 0, (
        "docs/kernels.md is not what docs/kernels/*.json say: run tools/kernels_table.py"
    )


def test_every_expectation_was_measured() -> None:
    """No row that no kernel ever answered, and no measurement that the page leaves out."""
    measured = set()
    for path in (ROOT / "docs/kernels").glob("*.json"):
        measured |= set(json.loads(path.read_text())["facts"])
    expected = set(tomllib.loads(EXPECTED.read_text()))
    assert measured <= expected
    # A capability that was added since the guests were last recorded is not in the page yet.
    assert {name for name in expected - measured if not name.startswith("doctor.")} == set()


def test_every_capability_has_its_expectation() -> None:
    """A new one needs a line in tests/kernels/expected.toml: on which kernels does it work in a guest?"""
    expected = {n.partition(".")[2] for n in tomllib.loads(EXPECTED.read_text()) if n.startswith("doctor.")}
    assert set(probe.names()) == expected
