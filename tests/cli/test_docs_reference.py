"""The reference pages are what the code says today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11),
    reason="missing capability: Python 3.11 (each version words argparse's help anew)",
)
def test_reference_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/build_docs.py", "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
