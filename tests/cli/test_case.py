"""`pagelens case`: the list, one case as JSON, errors."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from support.recording import pagelens

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/case.json").read_text())


def test_one_case_as_json() -> None:
    done = pagelens("case", "6", "--format", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, SCHEMA)
    assert answer["complete"] and answer["figures"]["munmap"]["reads"] == "SIGSEGV"


def test_the_list_and_errors() -> None:
    listed = pagelens("case").stdout
    assert "11  Who copied the parent?" in listed
    done = pagelens("case", "99")
    assert done.returncode == 2 and "no case 99" in done.stderr
    assert pagelens("case", "1", "--tour").returncode == 2
