"""Case 3 on this kernel: each present page without a map count is found and named."""

from __future__ import annotations

from typing import Any

import pytest

from pagelens.linux import probe
from pagelens.report.cases import case3

pytestmark = pytest.mark.requires("pfn", "kpagecount", "kpageflags")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return case3.run(lambda line: None)


def reasons(result: dict[str, Any]) -> dict[int, str]:
    return {
        int(r["start"], 16) + i * 4096: r["reason"] for r in result["evidence"] for i in range(r["pages"])
    }


def test_zero_pages(result: dict[str, Any]) -> None:
    found = reasons(result)
    zero = int(result["addresses"]["zero"], 16)
    # Two loads, three pages apart, and nothing between them.
    assert [found.get(zero + i * 4096) for i in range(4)] == ["zero page", None, None, "zero page"]


@pytest.mark.requires("thp")
def test_huge_zero_page(result: dict[str, Any]) -> None:
    found = reasons(result)
    huge = int(result["addresses"]["huge_zero"], 16)
    assert [found.get(huge + i * 4096) for i in range(512)] == ["huge zero page"] * 512


def test_counted_pages_are_not_listed(result: dict[str, Any]) -> None:
    found = reasons(result)
    written, text = (int(result["addresses"][name], 16) for name in ("written", "text"))
    assert written not in found and written + 4096 not in found and text not in found
    assert result["counted"] > 100
    assert result["uncounted"] == len(found)
    assert result["unexplained"] == 0


def test_frames_mapped_by_number_are_named_apart(result: dict[str, Any]) -> None:
    hidden = {r["region"] for r in result["hidden"]}
    listed = {r["region"] for r in result["evidence"]}
    assert "vvar" in hidden | listed or not hidden  # 6.19 and later count vvar's pages like any others
    ring = int(result["addresses"]["ring"], 16)
    if probe.status("perf-own").works and ring:
        everywhere = reasons(result) | {
            int(r["start"], 16) + i * 4096: "hidden" for r in result["hidden"] for i in range(r["pages"])
        }
        counted_on_old_kernels = ring not in everywhere
        assert counted_on_old_kernels or everywhere[ring] in ("hidden", "mapped by frame number")
