"""Runs `pagelens` as a user would: in a process of its own, as root or as nobody."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMAS = ROOT / "docs/schemas"


@functools.cache
def nobody_may_run() -> bool:
    """Whether this tree and its interpreter are readable for other users (not in a private directory)."""
    return pagelens_raw("--version", nobody=True).returncode == 0


def pagelens(*args: object, nobody: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command; the caller looks at the code."""
    if nobody and not nobody_may_run():
        pytest.skip("missing capability: a tree that other users may read (it lies in a private directory)")
    return pagelens_raw(*args, nobody=nobody)


def pagelens_raw(*args: object, nobody: bool) -> subprocess.CompletedProcess[str]:
    """As `pagelens`, without the question whether nobody may."""
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if nobody else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "pagelens.cli.main", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        timeout=60,
        check=False,
    )


def rows(schema: str, *args: object) -> Any:
    """The JSON of a command that must succeed, checked against docs/schemas/`schema`.json."""
    done = pagelens(*args, "--format", "json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    jsonschema.validate(value, json.loads((SCHEMAS / f"{schema}.json").read_text()))
    return value


def refused(code: int, *args: object, nobody: bool = False) -> str:
    """The message of a command that must fail with `code`: one line, no traceback."""
    done = pagelens(*args, nobody=nobody)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr
