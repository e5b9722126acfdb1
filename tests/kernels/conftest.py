"""Fixtures of the kernel tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.facts import Fact, Facts
from support.puppet import Puppet
from support.subjects import Subjects

PR_SET_THP_DISABLE = 41


@pytest.fixture(scope="session")
def fact() -> Fact:
    """Compares a measured value with expected.toml, and writes it down."""
    return Facts()


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    """A child that maps and touches as it is told; without huge pages, so that a byte is a page's matter."""
    with Puppet(subjects("puppet")) as child:
        child.sys("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0)
        yield child


@pytest.fixture
def guest() -> None:
    """Skips outside the test matrix: the settings are those of a guest, not of any machine."""
    if "VMTEST_GUEST" not in os.environ:
        pytest.skip("missing capability: guest (this checks the virtual machines' own settings)")
