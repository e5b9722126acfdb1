"""Builds the documentation site into site/: reference pages out of the code, then mkdocs in strict mode.

`--check` only fails where a committed reference page is not what the code says (tests call it).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"


def commands_page() -> str:
    """docs/reference/commands.md: the help of every command."""
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"
    from pagelens.cli import main as cli

    parts = [
        "# Commands",
        "",
        "Made from the parsers by `./dev docs`; do not edit.",
        "",
        "```text",
        cli.EPILOG,
        "```",
    ]
    for name, (_, line) in cli.available().items():
        parser, _ = cli.command_parser(name)
        parts += ["", f"## {name}", "", line[0].upper() + line[1:] + ".", "", "```text"]
        parts += [parser.format_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


def events_page() -> str:
    """docs/reference/events.md: the columns of `events`."""
    from pagelens.vm.events import EVENTS, TASK_ARGS

    lines = [
        "# The events table",
        "",
        "Made from `pagelens.vm.events` by `./dev docs`; do not edit. Times are CLOCK_MONOTONIC nanoseconds.",
        "",
        "| column | type | unit | null when | meaning |",
        "|---|---|---|---|---|",
        *(f"| `{c.name}` | {c.type} | {c.unit} | {c.null} | {c.doc} |" for c in EVENTS),
        "",
        "## Arguments of task events",
        "",
        "| name | args |",
        "|---|---|",
        *(f"| {name} | {', '.join(args)} |" for name, args in TASK_ARGS.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write (or check) the pages and build the site."""
    pages = {"commands.md": commands_page(), "events.md": events_page()}
    if "--check" in sys.argv[1:]:
        stale = [n for n, text in pages.items() if (REFERENCE / n).read_text() != text]
        if stale:
            sys.stderr.write(f"docs/reference is stale: {', '.join(stale)} (run ./dev docs)\n")
        return 1 if stale else 0
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (REFERENCE / name).write_text(text)
    if "--pages" in sys.argv[1:]:
        return 0
    try:
        import mkdocs  # noqa: F401  (probe only: the docs group is installed on first use)
    except ImportError:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "mkdocs>=1.6", "mkdocs-material>=9.5"], check=True
        )
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", "site"],
        cwd=ROOT,
        env=environ,
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
