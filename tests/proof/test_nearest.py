"""Of profiles that a kernel contradicts equally, the one of the nearest release is taken."""

from __future__ import annotations

import pytest

from pagelens.model.profile import PROFILES
from pagelens.proof.probes import distance


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("6.18.44-fc", "linux-6.18"),
        ("6.1.0-50-cloud-amd64", "linux-6.1"),
        ("6.12.117+deb13-cloud-amd64", "linux-6.12"),
        ("6.8.0-45-generic", "linux-6.12"),
        ("7.0.3", "linux-6.18"),
        ("7.2.13+deb14-cloud-amd64", "linux-7.2"),
    ],
)
def test_the_nearest_release(release: str, name: str) -> None:
    names = sorted(n for n in PROFILES if n.startswith("linux-"))
    assert min(names, key=lambda n: distance(n, release)) == name
