"""The replay of a capture against the kernel's last snapshots: which vmas there are, and which pages in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagelens.capture.reader import Capture
from pagelens.why import classify
from pagelens.why.agreement import agreement
from support.captures import record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("root", "bpf", "libbpf", "perf-system")


def test_locked_memory(subjects: Subjects, tmp_path: Path) -> None:
    """What is locked is populated as it becomes writable, as it grows, and by calls that fail half-way."""
    found = agreement(classify(Capture(record(tmp_path, subjects("locked")))))
    assert (found["vmas"], found["pages"]) == (1.0, 1.0)


@pytest.mark.parametrize("seed", [1, 7, 12])
def test_shuffled_areas(subjects: Subjects, tmp_path: Path, seed: int) -> None:
    """Random calls, many of which fail half-way. Pages: not all, because MREMAP_DONTUNMAP of part of a locked vma
    unlocks more than the part in some kernels, and the replay does not keep vmas."""
    found = agreement(classify(Capture(record(tmp_path, subjects("shuffle"), seed, 600))))
    assert found["vmas"] == 1.0
    assert found["pages"] is not None and found["pages"] >= 0.95
