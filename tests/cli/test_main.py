"""The command table, exit codes and messages of the top level."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pagelens.cli import main as cli


def test_help_lists_every_command_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in cli.available())
    code = (
        "import sys; from pagelens.cli import main; main.main(['--help']);"
        "heavy = {'numpy', 'pyarrow', 'duckdb', 'rich', 'drgn', 'textual'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_command_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    near = next(iter(cli.available()), None)
    assert cli.main(["no-such-command"]) == 2
    assert "no command 'no-such-command'" in capsys.readouterr().err
    if near:
        assert cli.main([near + "x"]) == 2
        assert f"did you mean '{near}'?" in capsys.readouterr().err


def test_no_arguments_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: pagelens" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(cli.available()))
def test_every_command_has_help_and_refuses_nonsense(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser, command = cli.command_parser(name)
    assert (type(command).__doc__ or "").strip(), f"{name}: the docstring is the help"
    assert parser.format_help()
    assert cli.main([name, "--no-such-option"]) == 2
    assert "pagelens: " in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["map", str(os.getpid())], ["doctor"]])
def test_output_to_a_full_disk(args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pagelens.cli.main", *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        5, "pagelens: cannot write the output: No space left on device\n"
    )  # fmt: skip
