"""SIGKILL at every operation of merge, prune and export: what `verify` accepts is true, and the same call goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from live.test_checkpoint_dump import Failing
from pagelens.checkpoint import core, criu, prune
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.files import Files
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.verify import verify
from pagelens.cli.main import main
from pagelens.vm.errors import UsageError
from support.scribe import Scribe
from support.subjects import Subjects

Work = Callable[[Files], object]


@pytest.fixture
def folder() -> Iterator[Path]:
    # In memory: a disk takes longer to sync than all the rest does.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def chain(subjects: Subjects, folder: Path) -> tuple[Scribe, list[Path], list[int]]:
    """A chain of four of a program that is gone by now, and the step at which it was in each."""
    with Scribe(subjects("scribe"), 2, 4, folder / "file", pause_us=2000) as scribe:
        paths = [folder / "chain" / f"c{i}" for i in range(4)]
        paths[0].parent.mkdir()
        for number, path in enumerate(paths):
            dump(scribe.pid, path, parent=paths[number - 1] if number else None)
        return scribe, paths, [scribe.check(Stored.open(path).read) for path in paths]


def killed_at(work: Work, at: int) -> bool:
    """Run it in a child that kills itself at its operation `at`; False if it ended before that."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work(Failing(at, 0))
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.timeout(600)
def test_a_prune_killed_anywhere_harms_no_checkpoint_and_goes_on(
    chain: tuple[Scribe, list[Path], list[int]], folder: Path
) -> None:
    scribe, paths, steps = chain
    place = folder / "chain"

    def work(files: Files) -> None:
        prune.drop(paths[:2], paths[2:], files=files)

    shutil.copytree(place, folder / "fresh")
    at = 0
    for at in range(1, 200):
        if not killed_at(work, at):
            break
        for number, path in enumerate(paths):
            if path.exists() and verify(path).ok:
                assert scribe.check(Stored.open(path).read) == steps[number], at
            else:
                assert number < 2, at
        if any(p.exists() for p in paths[:2]) or any(name.endswith(".dropped") for name in hidden(place)):
            work(Files())  # else all was done
        for number in (2, 3):
            assert scribe.check(Stored.open(paths[number]).read) == steps[number]
        assert sorted(p.name for p in place.iterdir() if not p.name.endswith(".lock")) == ["c2", "c3"]
        shutil.rmtree(place)
        shutil.copytree(folder / "fresh", place)
    else:
        pytest.fail("it never came to its end")
    assert at > 40
    with pytest.raises(UsageError, match="no checkpoint"):
        work(Files())  # nothing is left to drop


def test_merge_and_exports_killed_anywhere_leave_the_old_or_the_new(
    chain: tuple[Scribe, list[Path], list[int]], folder: Path
) -> None:
    scribe, paths, steps = chain
    out = folder / "out"
    out.mkdir()
    alone, core_file, images = out / "alone", out / "core", out / "images"
    core.export(Stored.open(paths[3]), core_file)
    new = core_file.read_bytes()
    core.export(Stored.open(paths[2]), core_file, force=True)
    old = core_file.read_bytes()
    prune.merge(paths[2], alone)
    seen = []

    def merged() -> None:
        assert verify(alone).ok
        seen.append(scribe.check(Stored.open(alone).read))
        assert seen[-1] in steps[2:]

    def cored() -> None:
        assert core_file.read_bytes() in (old, new)

    def criud() -> None:
        if images.exists():
            assert criu.CriuPages(images).runs().pages
            shutil.rmtree(images)

    works: list[tuple[Work, Callable[[], None]]] = [
        (lambda files: prune.merge(paths[3], alone, force=True, files=files), merged),
        (lambda files: core.export(Stored.open(paths[3]), core_file, force=True, files=files), cored),
        (lambda files: criu.export(Stored.open(paths[3]), images, files=files), criud),
    ]
    for work, check in works:
        at = 1
        while killed_at(work, at):
            check()
            at += 1
        check()
        assert at > 5
        work(Files())
        check()
    assert set(seen) == set(steps[2:])
    assert core_file.read_bytes() == new
    assert [name for name in hidden(out) if not name.endswith(".lock")] == []


def test_what_a_deletion_by_an_older_version_left_can_be_dropped(
    chain: tuple[Scribe, list[Path], list[int]],
) -> None:
    _, paths, _ = chain
    prune.drop([], paths[1:2])
    for left in (paths[0], paths[1]):
        (left / "manifest.json").unlink()
    (paths[1] / "precious").touch()
    done = prune.drop([paths[0], paths[0]], [])
    assert (done.dropped, done.rewritten) == ([], [])
    assert not paths[0].exists()
    with pytest.raises(Exception, match="no checkpoint"):
        prune.drop([paths[1]], [])
    assert (paths[1] / "precious").exists()


def test_keep_and_drop_given_again_add_to_what_was_given(
    chain: tuple[Scribe, list[Path], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    scribe, paths, steps = chain
    words = ["prune", "--drop", str(paths[0]), "--keep", str(paths[2]), "--drop", str(paths[1])]
    assert main([*words, "--keep", str(paths[3]), "--keep", str(paths[3])]) == 0
    assert "dropped 2, rewrote 2" in capsys.readouterr().out
    for number in (2, 3):
        assert verify(paths[number]).ok
        assert scribe.check(Stored.open(paths[number]).read) == steps[number]


def test_what_another_needs_is_not_replaced(chain: tuple[Scribe, list[Path], list[int]]) -> None:
    _, paths, _ = chain
    with pytest.raises(UsageError, match=r"c2 needs .*c1, which this would replace; nothing was touched"):
        prune.merge(paths[1], paths[1], force=True)
    assert verify(paths[3]).ok
    prune.merge(paths[3], paths[3], force=True)
    assert verify(paths[3]).ok
