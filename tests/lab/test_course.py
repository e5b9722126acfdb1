"""The course: what its pages show is what the commands print today, and this kernel agrees with its scenarios."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from pagelens.cli import main as cli
from pagelens.lab.exercises import EXERCISES
from pagelens.model.profile import PROFILES, Profile
from pagelens.proof.probes import probe_profile
from support.machine import HERE
from support.scenarios import wrong_in_the_model, wrong_on_this_kernel

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "docs" / "lab"
PAGES = sorted(LAB.glob("*.md"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lab_pages", ROOT / "tools" / "lab_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_shows_what_is_printed(page: Path, tool: ModuleType) -> None:
    text = page.read_text()
    assert tool.filled(text) == text, "stale; fix: python tools/lab_pages.py --write"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_for_live_processes_are_accepted(page: Path) -> None:
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S):
        for command in re.findall(r"pagelens [^;|#\n]+", block):
            words = shlex.split(command)
            parser, _ = cli.command_parser(words[1])
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    parser.parse_args([w.replace("PID", "1").replace("$$", "1") for w in words[2:]])
                except SystemExit as stop:
                    assert not stop.code, f"{command}: {said.getvalue()}"


def test_every_page_has_its_parts_and_every_exercise_its_page() -> None:
    index = (LAB / "index.md").read_text()
    for page in PAGES:
        if page.stem != "index":
            text = page.read_text()
            assert f"({page.name})" in index
            assert "## Questions" in text and "<details><summary>" in text
            assert text.count("<details>") == text.count("</details>")
    for exercise in EXERCISES.values():
        page_of = (LAB / exercise.text.page).read_text()
        assert f"model grade {exercise.name}" in page_of or f"`{exercise.name}`" in page_of


@pytest.fixture(scope="module")
def profile() -> Profile:
    return probe_profile(machine=HERE).profile


@pytest.mark.parametrize("path", sorted(LAB.glob("*.plscn")), ids=lambda p: p.stem)
def test_this_kernel_agrees(path: Path, profile: Profile) -> None:
    assert wrong_on_this_kernel(path, profile) == []


@pytest.mark.parametrize("name", [n for n in PROFILES if n.startswith("linux-")])
def test_the_scenarios_hold_in_the_model_of_every_kernel(name: str) -> None:
    for path in LAB.glob("*.plscn"):
        assert wrong_in_the_model(path, name) == []
