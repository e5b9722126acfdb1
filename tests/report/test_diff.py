"""diff: states into words and bytes; two moments of a process, of a capture, two processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from pagelens.linux import regions, snapshot
from pagelens.linux.procfs import Process
from pagelens.report import transitions
from pagelens.report.diff import Moment, compare
from pagelens.vm import AddrRange, PageState
from support.captures import record
from support.cli import SCHEMAS, pagelens, refused
from support.puppet import PAGE, Puppet
from support.subjects import Subjects

P, F, X, Z = PageState.PRESENT, PageState.FILE, PageState.EXCLUSIVE, PageState.ZERO
K = 1024


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as child:
        yield child


def look(pid: int) -> Moment:
    with Process.open(pid) as proc:
        shot = snapshot.take(proc)
        return Moment(shot, regions.regions(proc, shot.vmas)[0], str(pid))


def checked(*args: object) -> Any:
    done = pagelens("diff", *args, "--format", "json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    jsonschema.validate(value, json.loads((SCHEMAS / "diff.json").read_text()))
    return value


@pytest.mark.parametrize(
    ("before", "after", "file_vma", "word", "effect"),
    [
        (0, P | X, False, "new page of zeros", {"Rss": 4 * K, "Anonymous": 4 * K, "Private_Dirty": 4 * K}),
        (0, P | X, True, "copied straight from the file", {"Rss": 4 * K, "Anonymous": 4 * K, "Private_Dirty": 4 * K}),
        (0, P | Z, False, "zero page", {}),
        (P | Z, P | X, False, "Rss grows now", {"Rss": 4 * K, "Anonymous": 4 * K, "Private_Dirty": 4 * K}),
        (P | F | X, P | X, True, "Rss stays", {"Anonymous": 4 * K, "Private_Clean": -4 * K, "Private_Dirty": 4 * K}),
        (P | X, P, False, "somebody else", {"Private_Dirty": -4 * K, "Shared_Dirty": 4 * K}),
        (P | X, 0, False, "dropped", {"Rss": -4 * K, "Anonymous": -4 * K, "Private_Dirty": -4 * K}),
        (P | X, PageState.GUARD, False, "guard", {"Rss": -4 * K, "Anonymous": -4 * K, "Private_Dirty": -4 * K}),
        (P | X, PageState.SWAPPED, False, "swapped out",
         {"Rss": -4 * K, "Anonymous": -4 * K, "Private_Dirty": -4 * K, "Swap": 4 * K}),
    ],
)  # fmt: skip
def test_transitions(before: int, after: int, file_vma: bool, word: str, effect: dict[str, int]) -> None:
    assert word in transitions.describe(int(before), int(after), file_vma=file_vma)
    assert transitions.effect(int(before), int(after)) == effect


def test_effects_add_up_over_all_states() -> None:
    """Rss is the sum of its four parts, and going there and back is nothing, for every pair of states."""
    states = [int(a | b | c | d) for a in (0, P) for b in (0, F) for c in (0, X) for d in (0, Z)]
    parts = ("Private_Clean", "Private_Dirty", "Shared_Clean", "Shared_Dirty")
    for one in states:
        for two in states:
            there, back = transitions.effect(one, two), transitions.effect(two, one)
            assert {f: -v for f, v in back.items()} == there
            assert sum(there.get(f, 0) for f in parts) == there.get("Rss", 0)


def test_pages_explain_all_fields(puppet: Puppet) -> None:
    base = puppet.island(100)
    puppet.write(base, 10)
    puppet.read(base + 50 * PAGE, 5)
    before = look(puppet.pid)
    puppet.write(base + 8 * PAGE, 4)  # 2 of them new
    puppet.write(base + 50 * PAGE, 2)
    puppet.madvise(base, 3, "DONTNEED")
    found = compare(before, look(puppet.pid), where=AddrRange(base, base + 100 * PAGE))
    assert [(p.start - base) // PAGE for p in found.pages] == [0, 10, 50]
    assert [p.pages for p in found.pages] == [3, 2, 2]
    assert found.explained["Rss"] == (PAGE, PAGE)
    assert all(part == whole for part, whole in found.explained.values())
    (vma,) = found.regions
    assert vma["what"] == "changed" and vma["changes"]["Rss"] == [10 * PAGE, 11 * PAGE]


def test_map_changes(puppet: Puppet) -> None:
    one, two = puppet.island(4), puppet.island(8)
    before = look(puppet.pid)
    puppet.sys("munmap", one, 4 * PAGE)
    puppet.sys("mprotect", two, 8 * PAGE, 1)
    three = puppet.island(2)
    found = compare(before, look(puppet.pid))
    what = {r["start"]: r["what"] for r in found.regions}
    if three != one:
        assert what[one] == "went"
        assert what[three] == "came"
    assert what[two] == "rw-p to r--p"


def test_fork_sides_by_address(puppet: Puppet) -> None:
    base = puppet.island(8)
    puppet.write(base, 8)
    parent, child = puppet.pid, puppet.fork()
    puppet.write(base, 3)
    found = checked(parent, child, "--frames", "--range", f"{base:x}+32k")
    assert found["by"] == "address"
    copied = [p for p in found["pages"] if p["start"] == hex(base)]
    assert [(p["pages"], p["copied"]) for p in copied] == [(3, True)]
    assert {p["what"] for p in copied} == {"each has a page of its own"}
    puppet.back()


@contextlib.contextmanager
def writing(puppet: Puppet, base: int, pages: int) -> Iterator[None]:
    """A new page every 30 ms meanwhile: whenever the command takes its two looks, some lie between them."""
    stop = threading.Event()

    def work() -> None:
        for page in range(pages):
            if stop.wait(0.03):
                return
            puppet.write(base + page * PAGE)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.requires("root", "bpf", "libbpf", "perf-system")
def test_process_now_and_later(puppet: Puppet) -> None:
    base = puppet.island(2000)
    with writing(puppet, base, 2000):
        found = checked(puppet.pid, "--in", "1", "--range", f"{base:x}+8000k")
    (change,) = found["pages"]
    # Each changed page has its own fault, and all come from the one store. A page that was written while the
    # second look was being taken (after its time, before its read of pagemap) shows as changed, its fault as
    # later.
    assert change["pages"] > 1
    assert change["pages"] - change["faults"] in (0, 1)
    assert [(s["function"], s["faults"]) for s in change["stores"]] == [("main", change["faults"])]
    assert change["chain"][0]["cause"] == "first-write"


def test_process_now_and_later_without_privilege(subjects: Subjects) -> None:
    program = subjects("puppet")
    for parent in program.parents[:3]:
        parent.chmod(0o755)
    if os.geteuid():
        pytest.skip("missing capability: root (to become nobody)")
    with Puppet(program, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") as own:
        base = own.island(2000)
        where = f"{base:x}+8000k"
        with writing(own, base, 2000):
            done = pagelens("diff", own.pid, "--in", "1", "--range", where, "--format", "json", nobody=True)
        assert done.returncode == 0, done.stderr
        # Recorded by perf meanwhile: user-mode stores have names, without root and without BPF.
        (change,) = json.loads(done.stdout)["pages"]
        assert change["pages"] > 0
        assert change["stores"], done.stdout


def test_two_programs_by_region(puppet: Puppet) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        found = checked(puppet.pid, other.pid)
        assert found["by"] == "region"
        assert {"sleep text", "puppet text"} <= {r["region"] for r in found["regions"]}
    finally:
        other.kill()
        other.wait()


@pytest.mark.requires("root", "bpf", "libbpf", "perf-system")
def test_capture(subjects: Subjects, tmp_path: Path) -> None:
    capture = record(tmp_path, subjects("placed_faults"))
    found = checked(capture, "--pages", "0")
    touched = [p for p in found["pages"] if p["stores"] and p["stores"][0]["function"] == "touch"]
    assert sum(s["faults"] for p in touched for s in p["stores"] if s["function"] == "touch") == 2000
    assert all(r["chain"][0]["cause"] == "first-write" for r in touched)
    explained = {r["field"]: (r["by_pages"], r["change"]) for r in found["explained"]}
    assert explained["Rss"][0] == explained["Rss"][1] > 2000 * PAGE
    text = pagelens("diff", capture, "--explain").stdout
    assert "present and mapped" in text or "pages present in memory" in text


def test_wrong_sides(puppet: Puppet, tmp_path: Path) -> None:
    assert "second side" in refused(2, "diff", puppet.pid)
    assert "leave out B" in refused(2, "diff", puppet.pid, puppet.pid, "--in", "1")
    assert "is a process" in refused(2, "diff", f"{puppet.pid}@exec", puppet.pid)
    assert "not a pagelens capture" in refused(5, "diff", tmp_path)


def test_states_of_large_columns() -> None:
    state = np.array([int(P | X), int(P | F), 0, int(P | Z)], np.uint32)
    assert transitions.contribution(state)["Rss"].tolist() == [True, True, False, False]
