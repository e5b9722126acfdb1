"""left_out.toml leaves out what it names, and names only tests that exist."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vmtest import plugin

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests/kernels/left_out.toml"


def test_names_only_what_exists() -> None:
    """A pattern that fits nothing hides a test that was renamed: it would run in guests, or no longer."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/live"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    for entry in tomllib.loads(FILE.read_text())["left_out"]:
        assert entry["why"]
        among = fnmatch.filter(tests, entry["tests"])
        assert among, entry["tests"]
        for pattern in entry.get("but", []):
            assert fnmatch.filter(among, pattern), pattern


def test_kernels_and_exceptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[[left_out]]\ntests = "a.py::*"\nbut = ["*::keep*"]\nkernels = ["6.1"]\nwhy = "x"\n')
    monkeypatch.setenv("VMTEST_LEFT_OUT", str(file))
    monkeypatch.setenv("VMTEST_KERNEL", "6.1")
    assert plugin._left_out("a.py::x")
    assert not plugin._left_out("a.py::keep_me")
    assert not plugin._left_out("b.py::x")
    monkeypatch.setenv("VMTEST_KERNEL", "6.12")
    assert not plugin._left_out("a.py::x")
