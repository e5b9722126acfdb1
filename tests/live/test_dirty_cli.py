"""`pagelens dirty` as a script sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pagelens.cli.main import main
from support.puppet import MAP_ANON, MAP_PRIVATE, MAP_SHARED, Puppet
from support.subjects import Subjects

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PAGELENS_TRACEBACK": "1"}
SCHEMA = json.loads((ROOT / "docs/schemas/dirty.json").read_text())


def _dirty(*args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagelens.cli.main", "dirty", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False, timeout=60)
    assert not check or done.returncode == 0, (done.stdout, done.stderr)
    return done


def _lines(text: str) -> list[dict[str, Any]]:
    out = [json.loads(line) for line in text.splitlines()]
    for row in out:
        jsonschema.validate(row, SCHEMA)
        assert sum(row["reasons"].values()) == row["dirty_pages"]
    return out


def _start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pagelens.cli.main", "dirty", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


pytestmark = pytest.mark.requires("uffd-wp-async")


def test_a_process_that_does_nothing_has_no_dirty_pages(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        rows = _lines(_dirty("--format", "json", "--interval", "0.05", "--count", "3", puppet.pid).stdout)
    assert [(row["epoch"], row["dirty_pages"], row["complete"]) for row in rows] == [
        # The kernel writes a thread's rseq area when it runs on after the remote call.
        (0, min(1, rows[0]["dirty_pages"]), True),
        (1, 0, True),
        (2, 0, True),
    ]


def test_written_pages_with_ranges_and_content(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        puppet.write(at, 64, value=7)
        child = _start(
            "--format", "json", "--interval", "0.5", "--count", "3", "--ranges", "--content",
            "--range", f"{at:x}+256k", puppet.pid,
        )  # fmt: skip
        assert child.stdout
        before = child.stdout.readline()
        puppet.write(at + 5 * 4096, 2, value=9)
        puppet.write(at + 40 * 4096, 1, value=7)  # the same byte
        out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    rows = _lines(before + out)
    ranges = [entry for row in rows for entry in row["ranges"]]
    assert sorted(ranges) == [[f"{at + 5 * 4096:#x}", 2], [f"{at + 40 * 4096:#x}", 1]]
    assert sum(row["same_content"] for row in rows) == 1


def test_every_page_that_a_program_writes_during_its_run(subjects: Subjects) -> None:
    """CASES 7, from outside: the program writes 37 pages of a mapping of its own, and says where."""
    code = (
        "import mmap,ctypes;m=mmap.mmap(-1,100*4096,mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS);"
        "a=ctypes.addressof(ctypes.c_char.from_buffer(m));"
        "[m.__setitem__(i*4096,1) for i in range(0,74,2)];print(hex(a),flush=True);"
        "import os;os._exit(3)"
    )
    done = _dirty("--format", "json", "--ranges", "--", sys.executable, "-c", code, check=False)
    assert done.returncode == 3
    first, *rest = done.stdout.splitlines()
    base = int(first, 16)
    rows = _lines("\n".join(rest))
    listed = {
        int(start, 16) + i * 4096 for row in rows for start, pages in row["ranges"] for i in range(pages)
    }
    assert {p for p in listed if base <= p < base + 100 * 4096} == {base + i * 4096 for i in range(0, 74, 2)}


def test_a_program_killed_by_a_signal_is_reported_as_such(subjects: Subjects) -> None:
    assert _dirty("--", "sh", "-c", "kill -TERM $$", check=False).returncode == -signal.SIGTERM
    assert _dirty("--", "/no/such/program", check=False).returncode == 127
    assert _dirty("--", "/etc/passwd", check=False).returncode == 126


def test_exec_into_another_image_is_said(subjects: Subjects) -> None:
    rows = _lines(_dirty("--format", "json", "--", "sh", "-c", "exec sleep 0.05").stdout)
    assert any("exec" in note for row in rows for note in row["notes"])
    assert not rows[-1]["complete"]


def test_a_command_with_children_says_what_it_does_not_know() -> None:
    short = "head -c 99 /dev/zero | wc -c >/dev/null; "
    (row,) = _lines(_dirty("--format", "json", "--", "sh", "-c", short + ":").stdout)
    assert row["complete"]
    assert "children are not watched (--follow)" in row["notes"]
    # The last child goes on until it is watched, however busy the machine is.
    watched = "until grep -q ' uw ' /proc/$$/smaps; do sleep 0.01; done"
    rows = _lines(
        _dirty("--format", "json", "--follow", "--", "sh", "-c", f'{short} sh -c "$0"; :', watched).stdout
    )
    assert len({row["pid"] for row in rows}) > 1
    (last,) = (row for row in rows if any("what children wrote" in note for note in row["notes"]))
    assert not last["complete"]


def test_follow_lists_what_a_new_child_holds(subjects: Subjects) -> None:
    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        puppet.write(at, 64)
        parent = puppet.pid
        child = _start("--format", "json", "--interval", "0.3", "--count", "3", "--follow", parent)
        time.sleep(0.5)
        forked = puppet.fork()
        puppet.write(at, 3, value=1)
        out, err = child.communicate(timeout=30)
        puppet.back()
    assert child.returncode == 0, err
    rows = _lines(out)
    assert {row["pid"] for row in rows} == {parent, forked}
    first = next(row for row in rows if row["pid"] == forked)
    assert first["reasons"]["new"] == first["dirty_pages"] >= 64


def test_forecast_heat_and_faces(subjects: Subjects, tmp_path: Path) -> None:
    with Puppet(subjects("puppet")) as puppet:
        args = ("--interval", "0.05", "--count", "2", puppet.pid)
        text = _dirty("--forecast", "1G,500ms", "--heat", *args).stdout
        assert "pre-copy converges" in text
        assert "method: pagescan; complete: yes" in text
        last = _dirty("--forecast", "1G,500ms", "--format", "json", *args).stdout.splitlines()[-1]
        schema = json.loads((ROOT / "docs/schemas/dirty-forecast.json").read_text())
        jsonschema.validate(json.loads(last), schema)
        assert _dirty("--oneline", *args).stdout.count("|") == 4
        assert _dirty("--format", "csv", *args).stdout.startswith("epoch,pid,time_ns")
        out = tmp_path / "dirty.parquet"
        _dirty("--format", "parquet", "--ranges", "-o", out, *args)
        import pyarrow.parquet as pq

        table = pq.read_table(out).to_pylist()
        assert len(table) == 2
        listed = [sum(int(entry.partition("+")[2]) for entry in row["ranges"]) for row in table]
        assert listed == [row["dirty_pages"] for row in table]
        assert _dirty("--format", "parquet", "-o", out, *args, check=False).returncode == 2


def test_mapped_and_huge_and_locked(subjects: Subjects) -> None:
    """States of a target: a mapping made between looks, locked pages, a huge page."""
    from pagelens.dirty.track import track

    with Puppet(subjects("puppet")) as puppet, track(pid=puppet.pid) as tracker:
        tracker.epoch()
        at = puppet.island(16)
        puppet.write(at + 4096, 2)
        epoch = tracker.epoch()
        inside = [(a, n, int(w)) for a, n, w in zip(epoch.start, epoch.count, epoch.why, strict=True)
                  if at <= a < at + 16 * 4096]  # fmt: skip
        assert inside == [(at + 4096, 2, 3)]  # NEW
        puppet.sys("mlock", at, 16 * 4096)  # writes every page for the program: zeros to the untouched
        tracker.epoch()
        puppet.write(at + 5 * 4096, 1)
        epoch = tracker.epoch()
        assert [(int(a), int(n)) for a, n in zip(epoch.start, epoch.count, strict=True)
                if at <= a < at + 16 * 4096] == [(at + 5 * 4096, 1)]  # fmt: skip
        area = puppet.mmap(1024, flags=MAP_PRIVATE | 0x20)
        huge = (area + (2 << 20) - 1) & -(2 << 20)
        puppet.madvise(huge, 512, "HUGEPAGE")
        puppet.write(huge, 1)
        epoch = tracker.epoch()
        listed = [
            int(n) for a, n in zip(epoch.start, epoch.count, strict=True) if huge <= a < huge + (2 << 20)
        ]
        assert listed in ([512], [1])  # NEW whole where huge pages are to be had
        puppet.write(huge + 100 * 4096, 1)
        epoch = tracker.epoch()
        listed = [
            int(n) for a, n in zip(epoch.start, epoch.count, strict=True) if huge <= a < huge + (2 << 20)
        ]
        assert listed == [1]  # an armed huge page is split by the write: exact from then on


def test_a_mapping_that_lost_its_registration_in_a_merge_is_watched_again(subjects: Subjects) -> None:
    """mremap drops the registration of the vma that it merges into and leaves the entries' bits; a page written
    in that state is writable and looks armed."""
    from pagelens.dirty.track import track

    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(64)
        puppet.sys("munmap", at + 32 * 4096, 32 * 4096)
        puppet.write(at, 32)
        moved = puppet.island(16)
        with track(pid=puppet.pid) as tracker:
            tracker.epoch()
            to = at + 32 * 4096
            puppet.sys("mremap", moved, 16 * 4096, 16 * 4096, 3, to)  # MAYMOVE | FIXED: merges with the first
            for _ in range(3):
                puppet.write(at + 5 * 4096, 1)
                epoch = tracker.epoch()
                pages = {int(a) for a in epoch.addresses()}
                assert at + 5 * 4096 in pages


def test_contents_that_another_mapping_replaces_are_listed(subjects: Subjects) -> None:
    """The address is mapped still, by memory of another kind: its old contents are gone, and so are dirt."""
    from pagelens.dirty.epoch import Why, each
    from pagelens.dirty.track import track

    with Puppet(subjects("puppet")) as puppet:
        at = puppet.island(8)
        puppet.write(at, 8)
        with track(pid=puppet.pid) as tracker:
            tracker.epoch()
            puppet.mmap(8, flags=MAP_SHARED | MAP_ANON, at=at)
            assert (at, 8, Why.DISCARDED) in list(each(tracker.epoch()))
            puppet.write(at, 4)
            assert (at, 4, Why.WRITTEN) in list(each(tracker.epoch()))
            puppet.mmap(8, at=at)
            assert (at, 8, Why.DISCARDED) in list(each(tracker.epoch()))  # shared memory has contents unseen


def test_usage_errors_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for args, text in [
        ((), "name a process id"),
        (("--interval", "0", "1"), "--interval must be positive"),
        (("--count", "0", "1"), "--count must be positive"),
        (("--forecast", "fast", "1"), "not a forecast"),
        (("--backend", "magic", str(os.getppid())), "no backend"),
        ((str(os.getpid()),), "pagelens itself"),
        (("--range", "ffff800000000000-ffff800000001000", "1"), "kernel addresses"),
    ]:
        assert main(["dirty", *args]) == 2
        assert text in capsys.readouterr().err
