"""The subcommands' parsers: every option is there (a run takes minutes, a typo should not)."""

from __future__ import annotations

import argparse

import pytest

from vmtest import __main__ as cli
from vmtest import fetch, matrix, qemu
from vmtest.verdict import End, Verdict


def test_test_kernels_passes_everything_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[matrix.Plan] = []
    monkeypatch.setattr(fetch, "kernel", lambda name, update=False: argparse.Namespace(name=name))
    monkeypatch.setattr(matrix, "run", lambda plan: seen.append(plan) or [])
    arguments = [
        "test-kernels",
        "6.1",
        "--tests",
        "tests/x",
        "--set",
        "A=b=c",
        "--budget",
        "7",
        "--all",
        "--measure",
    ]
    monkeypatch.setattr("sys.argv", ["vmtest", *arguments])
    assert cli.main() == 1  # nothing passed is a failure
    (plan,) = seen
    assert (plan.kernels, plan.tests, plan.budget) == (["6.1"], ["tests/x"], 7)
    assert plan.environment == {"A": "b=c"}
    assert plan.all_tests
    assert plan.measure
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed, 0 skipped"


def test_a_part_of_the_tests_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["vmtest", "test-kernels", "--record", "--tests", "tests/live", "6.1"])
    assert cli.main() == 3
    assert "--record needs all of tests/kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "code", "exits"),
    [(End.EXITED, 7, 7), (End.EXITED, 0, 0), (End.OOM, 137, 137), (End.OOM, 0, 1), (End.HANG, None, 1)],
)
def test_in_kernel_ends_as_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: End,
    code: int | None,
    exits: int,
) -> None:
    kernel = fetch.Kernel("6.1", "6.1.0", cli.ROOT, None, None)
    seen: list[qemu.Machine] = []

    def run(machine: qemu.Machine, *rest: object) -> Verdict:
        seen.append(machine)
        return Verdict(end, code, "why", 4.0, 9.0, "last words")

    monkeypatch.setattr(fetch, "kernel", lambda name: kernel)
    monkeypatch.setattr(qemu, "run", run)
    monkeypatch.setattr(
        "sys.argv", ["vmtest", "in-kernel", "--memory", "512", "6.1", "--", "sh", "-c", "exit 7"]
    )
    assert cli.main() == exits
    assert seen[0].command == ["sh", "-c", "exit 7"]
    assert seen[0].memory == 512
    assert (end.value in capsys.readouterr().err) == (end is not End.EXITED)


@pytest.mark.parametrize(
    ("boots", "tries"), [([None, None, 5.0], 3), ([5.0], 1), ([None, None, None, 5.0], 3)]
)
def test_a_boot_that_failed_is_said_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, boots: list[float | None], tries: int
) -> None:
    ends = iter(boots)
    said: list[bytes] = []

    class Run:
        def __init__(self, *_: object) -> None:
            pass

        def finish(self, _: object) -> Verdict:
            boot = next(ends)
            end = End.EXITED if boot else End.NO_BOOT
            return Verdict(end, 0 if boot else None, "it stopped", boot, 9.0, "last words")

    monkeypatch.setattr(qemu, "_Run", Run)
    machine = qemu.Machine(fetch.Kernel("6.1", "6.1.0", cli.ROOT, None, None), ["true"], cli.ROOT)
    verdict = qemu.run(machine, said.append, said.append)
    assert len(list(ends)) == len(boots) - tries
    assert [b"boot failed, once more" in line for line in said] == [True] * (tries - 1)
    assert verdict.good == (boots[tries - 1] is not None)
