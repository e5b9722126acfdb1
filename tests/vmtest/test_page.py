"""docs/kernels.md is what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.facts import EXPECTED

ROOT = Path(__file__).parents[2]


def test_page_is_generated() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/kernels_table.py"), "--check"], check=False)
    assert done.returncode == 0, (
        "docs/kernels.md is not what docs/kernels/*.json say: run tools/kernels_table.py"
    )


def test_every_expectation_was_measured() -> None:
    """No row that no kernel ever answered, and no measurement that the page leaves out."""
    import tomllib

    measured = set()
    for path in (ROOT / "docs/kernels").glob("*.json"):
        measured |= set(json.loads(path.read_text())["facts"])
    assert measured == set(tomllib.loads(EXPECTED.read_text()))
