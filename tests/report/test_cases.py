"""The cases: each runs here, and its figures are the ones that the subject program makes true."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import pytest

from pagelens.report import cases
from pagelens.report.cases import (
    count_zero,
    drop_data,
    every_write,
    paging_lab,
    save_and_roll_back,
    thread_dirty,
    who_wrote,
    workers,
)
from pagelens.report.cases.lab import Lab
from pagelens.report.cases.text import as_dict, text_lines
from pagelens.vm.errors import CapabilityMissingError

recorder = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@recorder
def test_2_smaps_change_by_exactly_the_pages_that_were_written(lab: Lab) -> None:
    answer = who_wrote.run(lab)
    f = answer.figures
    rss, clean, dirty, anon = (
        f["written"][k] for k in ("Rss", "Private_Clean", "Private_Dirty", "Anonymous")
    )
    assert rss[0] == rss[1]
    assert clean == [4, 0]
    assert dirty[1] - dirty[0] == 4 and anon[1] - anon[0] == 4
    assert f["direct"]["Anonymous"][1] - f["direct"]["Anonymous"][0] == 4
    assert f["page1"] == ["file-page-cached", "file-cow"]
    assert f["page2"] == ["file-cow"]
    assert f["blank1"] == ["first-read", "zero-page-write"]
    source = (who_wrote.__file__ or "").replace("who_wrote.py", "subjects/who_wrote.c")
    with open(source) as stream:
        lines = stream.readlines()
    store = next(i for i, line in enumerate(lines, 1) if "the store that copies" in line)
    assert f["page1_lines"][1] == f"who_wrote.c:{store}"
    assert f["blank-read"]["Rss"][0] == f["blank-read"]["Rss"][1]
    assert f["blank-written"]["Anonymous"][1] - f["blank-written"]["Anonymous"][0] == 4


@recorder
def test_11_readers_copy_whatever_gc_freeze_does_and_an_array_is_not_copied(lab: Lab) -> None:
    answer = workers.run(lab, 60_000)
    copied = {name: one["copied"] for name, one in answer.figures["workers"].items()}
    assert copied["read"] > 900  # 60,000 lists of 64 bytes and more
    assert abs(copied["read+freeze"] - copied["read"]) < 0.1 * copied["read"]
    assert copied["collect"] > 900
    assert copied["collect+freeze"] < 0.2 * copied["collect"]
    assert copied["array"] < 0.2 * copied["read"]
    for one in answer.figures["workers"].values():
        # The recording sees the worker's whole life, its own counter the action alone.
        assert 0 <= one["copied"] - one["faults"] < 250


def test_1_as_this_kernel_shows_it_and_as_the_model_says(lab: Lab) -> None:
    figures = thread_dirty.run(lab).figures
    assert figures.get("faults_of_thread", 0) == 0
    assert figures["linux-6.1"] == {"soft_dirty_pages": 25601, "one_vma": True, "faults": 0}
    assert figures["linux-6.12"] == {"soft_dirty_pages": 0, "one_vma": False, "faults": 0}
    if figures["soft_dirty"]:
        assert (figures["soft_dirty"]["thread1"] > 25000) == figures["merged"]


def test_4_the_program_is_what_it_was(lab: Lab) -> None:
    answer = save_and_roll_back.run(lab)
    assert answer.complete
    assert answer.figures["same"] and answer.figures["verified"]
    assert 2560 <= answer.figures["incremental_pages"] <= 2570


def test_6_what_a_later_read_sees(lab: Lab) -> None:
    ways = drop_data.run(lab).figures
    assert {name: way["reads"] for name, way in ways.items()} == {
        "MADV_DONTNEED": "zeros",
        "MADV_FREE": "old",
        "MADV_COLD": "old",
        "MADV_PAGEOUT": "old",
        "MAP_NORESERVE": "old",
        "mmap-over": "zeros",
        "munmap": "SIGSEGV",
    }
    assert ways["MADV_DONTNEED"] == {"present_before": 64, "present_after": 0, "reads": "zeros", "faults": 64}


def test_10_the_kernel_agrees_and_a_list_is_slower_than_a_tree(lab: Lab) -> None:
    answer = paging_lab.run(lab)
    figures = answer.figures
    assert answer.complete and figures["disagreements"] == 0
    assert figures["flushes"] == {"copy-on-write": 2, "zap": 3, "mprotect": 2, "fork write-protects": 1}
    assert figures["executable"]["vmas"] >= figures["executable"]["loads"] >= 2
    limit = figures["limit"]
    assert limit["vmas"] == figures["max_map_count"] + 1
    assert (limit["split"], limit["one_more"], limit["two_more"]) == ("ENOMEM", "mapped", "ENOMEM")
    few, many = figures["find_vma"][1], figures["find_vma"][-1]
    assert many["vmas"] / few["vmas"] > 100
    # A list costs what it is long; the tree a level more for sixteen times the vmas.
    assert many["list_ns"] > 20 * few["list_ns"]
    assert many["list_ns"] > 5 * many["kernel_ns"]


def test_10_without_a_compiler_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise CapabilityMissingError("no C compiler", capability="cc")

    monkeypatch.setattr(lab, "compile", none)
    answer = paging_lab.run(lab)
    assert not answer.complete
    assert "no C compiler" in answer.missing[0]
    assert answer.figures["disagreements"] == 0


@recorder
def test_7_the_recording_has_exactly_the_pages_that_were_written(lab: Lab) -> None:
    figures = every_write.run(lab).figures
    assert figures["seen"] == figures["said"] == 170


@pytest.mark.requires("kpagecount", "pfn")
def test_3_every_page_with_count_zero_is_named(lab: Lab) -> None:
    figures = count_zero.run(lab).figures
    assert figures["count_zero"] == sum(figures["kinds"].values())
    assert figures["kinds"]["the zero page (read, never written)"] >= 64
    assert not [kind for kind in figures["kinds"] if "not explained" in kind]


def test_without_a_recorder_the_answers_say_what_is_missing(lab: Lab) -> None:
    lab._why_not = "not here"
    for entry in cases.ENTRIES:
        if entry.number in (2, 7):
            answer = cases.run(entry, lab)
            assert not answer.complete
            assert "not here" in " ".join(answer.missing)
            assert text_lines(answer)[0].startswith(f"[{entry.number}] ")
            assert as_dict(answer)["missing"]


def test_the_tour_goes_on_where_a_case_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagelens.report.cases import tour

    def broken(entry: cases.Entry, lab: Lab) -> cases.Answer:
        raise CapabilityMissingError(f"nothing for {entry.number}", fix="none")

    monkeypatch.setattr(cases, "run", broken)
    monkeypatch.setattr(tour, "_proof", lambda say, seconds: None)
    out = io.StringIO()
    assert tour.tour(out) == 0
    text = out.getvalue()
    assert all(f"nothing for {entry.number}" in text for entry in cases.ENTRIES)
    assert f"root {'yes' if os.geteuid() == 0 else 'no'}" in text
