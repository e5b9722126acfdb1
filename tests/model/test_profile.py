"""Profiles are data: each rule is a named field, and a variant differs in what it is told to."""

from __future__ import annotations

import inspect
import re

import pytest

from pagelens.model import PROFILES, Machine, get_profile, profile
from pagelens.vm.errors import UsageError


def test_every_rule_has_a_kernel_function_beside_it_and_is_used() -> None:
    text = inspect.getsource(profile.Profile)
    package = "".join(
        path.read_text() for path in sorted(__import__("pathlib").Path(profile.__file__).parent.glob("*.py"))
    )
    for rule in profile.Profile.rules():
        assert re.search(rf"    #[^\n]*\n    {rule}: bool", text), f"{rule} has no comment"
        assert re.search(rf"profile\.{rule}\b", package), f"{rule} is never asked for"


def test_profiles_differ_from_each_other() -> None:
    values = list(PROFILES.values())
    assert [p.name for p in values] == ["linux-6.1", "linux-6.12", "linux-6.18", "linux-7.2"]
    assert len({tuple(getattr(p, r) for r in p.rules()) for p in values}) == 4


def test_variants_and_errors() -> None:
    variant = get_profile("linux-6.12").with_rules(stack_nohugepage=False)
    assert (variant.name, variant.stack_nohugepage) == ("linux-6.12+stack_nohugepage=0", False)
    assert Machine(variant).profile is variant
    with pytest.raises(UsageError, match=r"linux-6\.1, linux-6\.12"):
        get_profile("linux-9")
    with pytest.raises(UsageError, match="no rule 'magic'"):
        variant.with_rules(magic=True)


def test_the_table_of_rules_is_up_to_date() -> None:
    import subprocess
    import sys
    from pathlib import Path

    tool = Path(__file__).resolve().parents[2] / "tools" / "model_rules.py"
    assert subprocess.run([sys.executable, str(tool), "--check"], check=False).returncode == 0, (
        "run python tools/model_rules.py"
    )
