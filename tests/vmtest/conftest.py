"""Guests are for `./dev test-kernels`; here only one is booted, and more with `-m slow`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.getoption("markexpr"):
        own = [
            i for i in items if i.path.is_relative_to(Path(__file__).parent) and i.get_closest_marker("slow")
        ]
        config.hook.pytest_deselected(items=own)
        items[:] = [i for i in items if i not in own]


@pytest.fixture(scope="session")
def cached() -> None:
    """Skips where booting a guest would first have to download it (`./dev test-kernels` does)."""
    from vmtest import newer
    from vmtest.cache import cache_dir

    if not newer.is_here("qemu-system-x86"):
        pytest.skip("missing capability: qemu (./dev test-kernels fetches it)")
    index = cache_dir() / "kernels/index.json"
    if not index.exists() or not {"6.1", "6.12"} <= set(json.loads(index.read_text())):
        pytest.skip("missing capability: kernel cache (./dev test-kernels fills it)")
    if not list((cache_dir() / "images").glob("root-*.ext4")):
        pytest.skip("missing capability: guest image (./dev test-kernels makes it)")
