"""Code that misbehaves: each way is one sentence, and never a traceback or a grader that hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagelens.lab.exercises import EXERCISES
from pagelens.lab.grade import Grader
from pagelens.model.profile import get_profile
from pagelens.vm.errors import DamagedInputError

HEAD = "import sys\nfrom pagelens.lab import *\n\n\ndef dontneed(mm, start, length):\n"


def told(text: str, tmp_path: Path) -> str:
    """What the grader says of a solution that is wrong."""
    file = tmp_path / "mine.py"
    file.write_text(text)
    grader = Grader(EXERCISES["dontneed"], get_profile("linux-6.18"), seconds=0.3)
    failure = grader.grade(file, 1, 0).failure
    assert failure is not None
    return failure.text()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("    while True:\n        pass\n", "did not return within 0.3 s of CPU time"),
        ("    while True:\n        try:\n            pass\n        except BaseException:\n            pass\n",
         "did not return within 0.3 s of CPU time"),
        ("    return 1 / 0\n", "it raised ZeroDivisionError: division by zero (line 6)"),
        ("    return dontneed(mm, start, length)\n", "it raised RecursionError"),
        ("    sys.exit(0)\n", "it called sys.exit"),
        ("    import os\n    os._exit(3)\n", "its process ended, by exit code 3"),
        ("    import os\n    os.abort()\n", "its process ended, by a signal (SIGABRT)"),
        ("    x = bytearray(1 << 31)\n    return 0\n", "more than the 512 MiB of memory"),
        ("    return [0]\n", "dontneed returned a list ([0])"),
        ("    return None\n", "your code: None"),
        ("    return False\n", "your code: False (bool)"),
        ("    return input()\n", "it raised EOFError"),
        ("    mm.vmas = None\n    return 0\n", "mm.vmas is a NoneType; it must stay a list of Vma"),
        ("    mm.vmas.append(7)\n    return 0\n", "mm.vmas holds a int, not a Vma"),
        ("    mm.vmas[0].end = 'x'\n    return 0\n", "a vma's end is a str ('x'), not an int"),
        ("    mm.vmas[0].end += 1\n    return 0\n", "is not whole pages"),
        ("    mm.vmas.append(mm.vmas[0].copy())\n    return 0\n", "mm.vmas is not sorted"),
        ("    mm.ptes[start] = 3\n    return 0\n", "it raised TypeError: mm.ptes[page] takes a Pte, not int"),
        ("    mm.ptes = {}\n    return 0\n", "mm.ptes is a dict; change its entries"),
    ],
)  # fmt: skip
def test_code_that_misbehaves_is_told_in_one_sentence(body: str, sentence: str, tmp_path: Path) -> None:
    text = told(HEAD + body, tmp_path)
    assert sentence in text
    assert "wrong: operation 4 of 'in a vma': madvise a[1:3] dontneed" in text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def other(mm): pass\n", "has no function 'dontneed'"),
        ("dontneed = 3\n", "dontneed is a int, not a function"),
        ("def dontneed(:\n", "it raised SyntaxError: invalid syntax (line 1)"),
        ("import nothing_of_that_name\n", "it raised ModuleNotFoundError"),
        ("while True: pass\n", "did not return within 0.3 s of CPU time"),
        ("raise SystemExit(0)\n", "it called sys.exit"),
        ("\0", "cannot be loaded"),
    ],
)
def test_a_file_that_cannot_be_loaded(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedInputError) as error:
        told(text, tmp_path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_function_of_other_parameters(tmp_path: Path) -> None:
    text = told("def dontneed(mm): return 0\n", tmp_path)
    assert "dontneed cannot be called with 3 arguments: too many positional arguments" in text


def test_every_template_says_that_it_is_still_to_be_written(tmp_path: Path) -> None:
    for exercise in EXERCISES.values():
        file = tmp_path / "mine.py"
        file.write_text(exercise.text.template())
        failure = Grader(exercise, get_profile("linux-6.18"), seconds=0.3).grade(file, 1, 0).failure
        assert failure is not None
        assert failure.broken.startswith(
            f"it raised NotImplementedError: {exercise.function} is still to be written"
        )
