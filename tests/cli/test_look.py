"""map, pages and doctor from the outside: formats, schemas, and one sentence for each way to fail."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import pagelens, refused, rows
from support.puppet import PAGE, Puppet
from support.subjects import Subjects

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="missing capability: root (to become nobody)")


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as child:
        yield child


def test_map_and_pages_agree(puppet: Puppet) -> None:
    base = puppet.island(100)
    puppet.write(base + 10 * PAGE, 20)
    row = next(r for r in rows("map", "map", puppet.pid) if r["start"] == hex(base))
    assert (row["size"], row["rss"], row["dirty"], row["perms"]) == (100 * PAGE, 20 * PAGE, 20 * PAGE, "rw-p")
    where = f"{base:x}-{base + 100 * PAGE:x}"
    (run,) = rows("pages", "pages", puppet.pid, where)
    assert (run["start"], run["pages"], run["kind"]) == (hex(base + 10 * PAGE), 20, "anon")
    (counts,) = rows("pages-by-region", "pages", puppet.pid, where, "--by", "region")
    assert (counts["pages"], counts["present"], counts["absent"]) == (100, 20, 80)


@pytest.mark.requires("pfn", "kpagecount", "kpageflags")
def test_frames(puppet: Puppet) -> None:
    base = puppet.island(4)
    puppet.write(base, 2)
    puppet.read(base + 2 * PAGE)
    found = rows("pages", "pages", puppet.pid, f"{base:x}+16k", "--frames")
    assert [(r["mapcount"], "ANON" in r["flags"], "ZERO_PAGE" in r["flags"]) for r in found][-1] == (
        0,
        False,
        True,
    )
    assert sum(r["pages"] for r in found if r["mapcount"] == 1 and "ANON" in r["flags"]) == 2
    only = rows("pages", "pages", puppet.pid, f"{base:x}+16k", "--mapcount", 0)
    assert [r["start"] for r in only] == [hex(base + 2 * PAGE)]


def test_frames_where_nothing_is_present(subjects: Subjects) -> None:
    with mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert rows("pages", "pages", os.getpid(), "--frames", f"{start:#x}+8k") == []


def test_options_may_stand_between_arguments(puppet: Puppet) -> None:
    here = f"{puppet.island(4):#x}+16k"
    between = rows("pages-by-region", "pages", puppet.pid, "--by", "region", here)
    assert between == rows("pages-by-region", "pages", puppet.pid, here, "--by", "region")
    assert len(between) == 1
    assert " extra\n" in pagelens("pages", puppet.pid, "--frames", here, "extra").stderr


def test_states_filter(puppet: Puppet) -> None:
    base = puppet.island(4)
    puppet.write(base)
    puppet.read(base + PAGE)
    where = f"{base:x}+16k"
    assert [r["start"] for r in rows("pages", "pages", puppet.pid, where, "--state", "present,!zero")] == [
        hex(base)
    ]
    assert refused(2, "pages", puppet.pid, "--state", "purple").startswith("pagelens: no page state 'purple'")


def test_doctor() -> None:
    found = rows("doctor", "doctor", "pagemap", "soft-dirty")
    assert [r["capability"] for r in found] == ["pagemap", "soft-dirty"]
    assert "no capability" in refused(2, "doctor", "telepathy")


def test_files(puppet: Puppet, tmp_path: Path) -> None:
    out = tmp_path / "map.parquet"
    assert pagelens("map", puppet.pid, "--format", "parquet", "-o", out).returncode == 0
    import pyarrow.parquet as pq

    assert pq.read_table(out).num_rows > 5
    assert "exists" in refused(2, "map", puppet.pid, "--format", "parquet", "-o", out)
    text = pagelens("map", puppet.pid, "--format", "csv").stdout
    assert text.splitlines()[0].startswith("start,end,perms,size,rss")


@pytest.mark.parametrize("command", ["map", "pages"])
def test_gone_and_wrong_targets(command: str, tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert refused(4, command, child.pid) == f"pagelens: no process {child.pid}\n"
    assert "neither a process id nor a capture" in refused(2, command, "nonsense")
    assert "kernel thread" in refused(2, command, 2)
    zombie = subprocess.Popen(["true"])
    try:
        while Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert "zombie" in refused(4, command, zombie.pid)
    finally:
        zombie.wait()


def test_wrong_ranges(puppet: Puppet) -> None:
    assert "kernel addresses" in refused(2, "pages", puppet.pid, "ffff800000000000-ffff800000001000")
    assert "nothing is mapped" in refused(2, "pages", puppet.pid, "1000-2000")
    assert "not a range" in refused(2, "pages", puppet.pid, "zebra")


@needs_root
def test_nobody(puppet: Puppet) -> None:
    for command in ("map", "pages"):
        text = refused(3, command, puppet.pid, nobody=True)
        assert text.endswith("fix: run pagelens as root (sudo)\n"), text
    done = pagelens("doctor", "--format", "json", nobody=True)
    assert done.returncode == 0, done.stderr
    status = {r["capability"]: r["status"] for r in json.loads(done.stdout)}
    assert status["root"] == status["pfn"] == status["kpagecount"] == "no"
    assert status["pagemap"] == "yes"


@needs_root
def test_nobody_on_own_process(subjects: Subjects) -> None:
    program = subjects("puppet")
    for parent in program.parents[:3]:
        parent.chmod(0o755)
    with Puppet(program, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") as own:
        base = own.island(8)
        own.write(base, 3)
        done = pagelens("pages", own.pid, f"{base:x}+32k", "--format", "json", nobody=True)
        assert done.returncode == 0, done.stderr
        assert [r["pages"] for r in json.loads(done.stdout)] == [3]
        text = refused(3, "pages", own.pid, "--frames", nobody=True)
        assert "kpagecount" in text
