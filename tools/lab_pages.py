"""Fills in what the commands of the course print (docs/lab): `tools/lab_pages.py --write`; else checks it.

A block of kind `console` holds commands behind "$ ", each followed by its output. They are run in docs/lab, in
this process (a course of thirty commands takes seconds), and must be such that their output is the same
everywhere: the model with --kernel, or `cat`. Commands for a live process stand in `sh` blocks, without output.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

LAB = Path(__file__).resolve().parent.parent / "docs" / "lab"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)


def output_of(command: str) -> str:
    """What a command prints."""
    words = shlex.split(command)
    if words[0] == "cat":
        return (LAB / words[1]).read_text()
    if words[0] != "pagelens":
        raise ValueError(f"the course cannot run {command!r}")
    from pagelens.cli.main import main

    given = ""
    if "<" in words:
        at = words.index("<")
        given = (LAB / words[at + 1]).read_text()
        words = words[:at]
    out, before = io.StringIO(), (Path.cwd(), sys.stdin)
    os.chdir(LAB)
    sys.stdin = io.StringIO(given)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main(words[1:])
    finally:
        os.chdir(before[0])
        sys.stdin = before[1]
    return out.getvalue()


def filled(text: str) -> str:
    """A page with the output of its commands as it is now."""

    def block(match: re.Match[str]) -> str:
        commands = [line for line in match[1].splitlines() if line.startswith("$ ")]
        parts = [f"{line}\n{output_of(line[2:]).rstrip()}\n" for line in commands]
        return "```console\n" + "".join(parts) + "```"

    return _BLOCK.sub(block, text)


def main_() -> int:
    """Write or check all pages; 1 where one is stale."""
    stale = []
    for page in sorted(LAB.glob("*.md")):
        text = page.read_text()
        now = filled(text)
        if now != text:
            stale.append(page.name)
            if "--write" in sys.argv[1:]:
                page.write_text(now)
    if stale:
        sys.stderr.write(f"{'written' if '--write' in sys.argv[1:] else 'stale'}: {' '.join(stale)}\n")
    return 1 if stale and "--write" not in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main_())
