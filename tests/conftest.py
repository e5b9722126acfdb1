"""Shared by all tests: the `requires` marker, compiled subject programs."""

from __future__ import annotations

import functools

import pytest

from support.subjects import Subjects


@functools.cache
def _status(capability: str) -> tuple[bool, str]:
    from pagelens.linux.probe import capability_status

    return capability_status(capability)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("requires"):
        for capability in marker.args:
            there, why = _status(capability)
            if not there:
                pytest.skip(f"missing capability: {capability} ({why})")


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """Compiles C sources of tests/support/subjects once per session."""
    return Subjects(tmp_path_factory.mktemp("subjects"))
