"""Shared by all tests: the `requires` marker, compiled subject programs."""

from __future__ import annotations

import functools

import pytest
from hypothesis import HealthCheck, settings

from support.subjects import Subjects

# Fixtures that any test may ask for by name.
from support.system import (
    change_setting,
    ksm,
    no_numa_balancing,
    numa_balancing,
    swap,
    thp_always,
    thp_madvise,
)

__all__ = [
    "change_setting",
    "ksm",
    "no_numa_balancing",
    "numa_balancing",
    "subjects",
    "swap",
    "thp_always",
    "thp_madvise",
]

# How long an example takes says something of the machine's load, and nothing of the code.
settings.register_profile("loaded", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loaded")


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
def subjects() -> Subjects:
    """Compiles C sources of tests/support/subjects, once for each version of a source."""
    return Subjects()
