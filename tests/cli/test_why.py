"""`pagelens why`: its JSON, its table, its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from support.recording import Run, pagelens, record

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/why.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    code = (
        "import mmap, os; m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS);\n"
        "import ctypes; print(ctypes.addressof(ctypes.c_char.from_buffer(m)));\n"
        "m[0] = 1; x = m[8192]; m[8192] = 2"
    )
    return record(tmp_path_factory.mktemp("why"), [sys.executable, "-c", code])


pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


def test_json_is_as_the_schema_says_and_adds_up(run: Run) -> None:
    done = pagelens("why", str(run.path), "--format", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, SCHEMA)
    faults = run.faults
    assert answer["subject"]["faults"] == faults["recorded"] + faults["failed"] + faults["gup"]
    assert sum(v["evidence"][0]["faults"] for v in answer["verdicts"]) == answer["subject"]["faults"]
    assert abs(sum(v["evidence"][0]["share"] for v in answer["verdicts"]) - 1) < 1e-9
    assert "unknown" not in {v["cause"] for v in answer["verdicts"]}


def test_a_page_tells_its_whole_story(run: Run) -> None:
    base = int(run.stdout)
    done = pagelens("why", str(run.path), f"{base + 8192:x}", "--format", "json")
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, SCHEMA)
    assert [v["cause"] for v in answer["verdicts"]] == ["first-read", "zero-page-write"]
    mapped = [e for e in answer["verdicts"][0]["evidence"] if e.get("role") == "mapped it"]
    assert len(mapped) == 1
    assert mapped[0]["what"].startswith("mmap(0, 0x100000, 3, 34,")
    untouched = json.loads(pagelens("why", str(run.path), f"{base + 4096:x}", "--format", "json").stdout)
    assert untouched["verdicts"] == []
    assert "never touched" in untouched["subject"]["notes"][0]


def test_a_range_and_a_vma(run: Run) -> None:
    base = int(run.stdout)
    done = pagelens("why", str(run.path), "--page", f"{base:x}+1M", "--format", "json")
    answer = json.loads(done.stdout)
    assert {v["cause"]: v["evidence"][0]["faults"] for v in answer["verdicts"]} == {
        "first-write": 1,
        "first-read": 1,
        "zero-page-write": 1,
    }
    done = pagelens("why", str(run.path), "--vma", "0", "--format", "csv")
    assert done.returncode == 0
    assert done.stdout.startswith("cause,confidence,faults,pages,share,time_ns,title,remedy,doc")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["why"], 2, "needs a capture"),
        (["why", "/nonexistent.plens"], 2, "no capture"),
        (["why", "CAP", "zzz"], 2, "not an address"),
        (["why", "CAP", "7f00", "--vma", "1"], 2, "one of"),
        (["why", "CAP", "--vma", "100000"], 2, "has vmas 0 to"),
    ],
)
def test_errors_are_one_sentence(run: Run, arguments: list[str], code: int, message: str) -> None:
    done = pagelens(*(str(run.path) if a == "CAP" else a for a in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
