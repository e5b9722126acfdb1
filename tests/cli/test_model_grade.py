"""`pagelens model grade` from a student's chair: each way to fail is one sentence and an exit code."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from support.cli import ROOT, SCHEMAS, pagelens

RIGHT = ROOT / "tests/lab/solutions/dontneed.py"
HEAD = "import sys\nfrom pagelens.lab import *\n\n\ndef dontneed(mm, start, length):\n"


def grade(body: str, tmp_path: Path, *args: object):  # type: ignore[no-untyped-def]
    file = tmp_path / "mine.py"
    file.write_text(body)
    return pagelens("model", "grade", "dontneed", file, "--kernel", "linux-6.18", "--programs", 0, *args)


@functools.cache
def nobody_may_start_it_anew() -> bool:
    # The grader starts the interpreter a second time; it may lie where other users may not look.
    code = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', '']).returncode)"
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    return not subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, cwd="/").returncode


@pytest.mark.parametrize("nobody", [False, True])
def test_right_in_json_against_this_kernel(nobody: bool) -> None:
    if nobody and not nobody_may_start_it_anew():
        pytest.skip("missing capability: an interpreter that other users may start")
    done = pagelens(
        "model", "grade", "dontneed", RIGHT, "--seed", 3, "--programs", 2, "--format", "json", nobody=nobody
    )
    assert done.returncode == 0, done.stdout + done.stderr
    value = json.loads(done.stdout)
    jsonschema.validate(value, json.loads((SCHEMAS / "model-grade.json").read_text()))
    assert (value["right"], value["failure"], value["seed"]) == (True, None, 3)
    assert value["kernel"] and value["graded"] > 10


def test_wrong_names_the_operation_what_was_expected_and_how_to_repeat_it(tmp_path: Path) -> None:
    text = RIGHT.read_text().replace("            result = -errno.ENOMEM\n", "")
    done = grade(text, tmp_path, "--format", "json")
    assert done.returncode == 1
    value = json.loads(done.stdout)
    jsonschema.validate(value, json.loads((SCHEMAS / "model-grade.json").read_text()))
    failure = value["failure"]
    assert failure["wrong"] == [{"subject": "the answer", "expected": "-ENOMEM", "got": "0"}]
    assert failure["operation"] == "madvise a[0:6] dontneed"
    scenario = tmp_path / "again.plscn"
    scenario.write_text(failure["scenario"] + "expect result ENOMEM\n")
    assert pagelens("model", "run", scenario).returncode == 0
    done = grade(text, tmp_path)
    assert "the model (linux-6.18): -ENOMEM\n    your code: 0\n" in done.stdout
    assert "to repeat it" in done.stdout


@pytest.mark.parametrize(
    ("text", "code", "sentence"),
    [
        (HEAD + "    return 1 / 0\n", 1, "it raised ZeroDivisionError: division by zero (line 6)"),
        (HEAD + "    while True: pass\n", 1, "did not return within 0.3 s of CPU time"),
        ("def other(mm): pass\n", 5, "has no function 'dontneed'"),
    ],
)
def test_code_that_misbehaves(text: str, code: int, sentence: str, tmp_path: Path) -> None:
    done = grade(text, tmp_path, "--seconds", 0.3)
    assert done.returncode == code
    assert sentence in (done.stdout if code == 1 else done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def test_printing_does_not_matter_and_is_told(tmp_path: Path) -> None:
    text = RIGHT.read_text().replace("    result, at", "    print('here', start)\n    result, at")
    done = grade(text, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "note: it printed" in done.stdout


def test_a_helper_that_is_the_exercise_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from pagelens.lab import *\ndef munmap(mm, start, length): return mm.unmap(start, start + length)\n"
    )
    done = pagelens("model", "grade", "munmap", file, "--kernel", "linux-6.18")
    assert "mm.unmap is what this exercise asks for" in done.stdout
    assert done.returncode == 1


def test_list_and_templates(tmp_path: Path) -> None:
    done = pagelens("model", "grade", "--list", "--format", "json")
    names = [row["exercise"] for row in json.loads(done.stdout)["exercises"]]
    assert {"fault", "mmap", "munmap", "brk", "fork"} <= set(names)
    assert pagelens("model", "grade", "fault", "--template", "-o", tmp_path / "fault.py").returncode == 0
    done = pagelens("model", "grade", "fault", tmp_path / "fault.py", "--kernel", "linux-6.1")
    assert done.returncode == 1
    assert "it raised NotImplementedError: fault is still to be written" in done.stdout


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "grade needs an EXERCISE and a FILE"),
        (("fault",), "needs a FILE"),
        (("nonsense", RIGHT), "no exercise 'nonsense'; there are: find-vma, fault"),
        (("fault", "/nonexistent.py"), "no file /nonexistent.py"),
        (("fault", RIGHT, "--kernel", "linux-1.0"), "no kernel profile 'linux-1.0'"),
        (("fault", RIGHT, "--programs", -1), "--programs must be at least 0"),
        (("fault", RIGHT, "--template"), "--template takes no FILE"),
    ],
)
def test_usage(args: tuple[object, ...], sentence: str) -> None:
    done = pagelens("model", "grade", *args)
    assert done.returncode == 2
    assert sentence in done.stderr
