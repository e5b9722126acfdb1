"""Case 2 on this kernel: which store changed which field of smaps, read first and written first."""

from __future__ import annotations

from typing import Any

import pytest

from pagelens.report.cases import case2

K = 1024
pytestmark = pytest.mark.requires("root", "bpf", "libbpf", "perf-system")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    said: list[str] = []
    value = case2.run(said.append)
    assert said[-1] == value["answer"]
    return value


def row(result: dict[str, Any], run: str, step: str) -> dict[str, Any]:
    return next(r for r in result["evidence"] if r["run"] == run and r["step"] == step)


def changes(found: dict[str, Any]) -> dict[str, int]:
    return {f: after - before for f, (before, after) in found["fields"].items() if after != before}


def test_read_then_written(result: dict[str, Any]) -> None:
    read = row(result, "read, then written", "read data")
    assert changes(read) == {"Rss": 4 * K, "Private_Clean": 4 * K}
    assert read["after"] == ["present", "file", "exclusive"]
    write = row(result, "read, then written", "write data")
    # The question's own figures: clean 4 to 0, dirty and anonymous 4 more, Rss unchanged.
    assert write["fields"]["Private_Clean"] == [4 * K, 0]
    assert changes(write) == {"Private_Clean": -4 * K, "Private_Dirty": 4 * K, "Anonymous": 4 * K}
    assert (write["symbol"], write["pages"]) == ("initialised", 1)
    before, then = write["chain"][-2:]
    assert (before["what"], before["between"], before["cause"]) == (
        "read, no page",
        False,
        "file-page-cached",
    )
    assert (then["what"], then["between"], then["cause"]) == ("write, page present", True, "file-cow")
    assert [(s["function"], s["faults"]) for s in write["stores"]] == [("main", 1)]
    assert write["stores"][0]["line"] == read["stores"][0]["line"] + 1
    assert "Rss stays" in write["what"]


def test_written_first(result: dict[str, Any]) -> None:
    write = row(result, "written first", "write data")
    assert changes(write) == {"Rss": 4 * K, "Private_Dirty": 4 * K, "Anonymous": 4 * K}
    assert write["chain"][-1]["what"] == "write, no page"
    assert "copied straight from the file" in write["what"]


def test_bss(result: dict[str, Any]) -> None:
    read = row(result, "read, then written", "read bss")
    assert changes(read) == {}  # the zero page is in no field
    assert read["after"] == ["present", "zero"]
    write = row(result, "read, then written", "write bss")
    assert changes(write) == {"Rss": 4 * K, "Private_Dirty": 4 * K, "Anonymous": 4 * K}
    assert [r["what"] for r in write["chain"]] == ["read, no page", "write, page present"]
    assert write["symbol"] == "uninitialised"
    first = row(result, "written first", "write bss")
    assert changes(first) == changes(write)
    assert [r["what"] for r in first["chain"]] == ["write, no page"]
