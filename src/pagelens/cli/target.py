"""What a command looks at: a process id or a capture."""

from __future__ import annotations

import argparse
from pathlib import Path

from pagelens.vm.errors import UsageError


def parse(text: str) -> int | Path:
    """A process id, or the directory of a capture."""
    if text.isdigit():
        return int(text)
    path = Path(text)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{text} is a file, not a capture directory")
    raise UsageError(f"{text} is neither a process id nor a capture directory")


def pid_only(text: str, command: str) -> int:
    """A process id; a capture is refused with a clear word."""
    target = parse(text)
    if isinstance(target, Path):
        raise UsageError(f"{command} needs a process id here, not a capture")
    return target


def add_target(
    parser: argparse.ArgumentParser,
    help_text: str = "process id, or capture directory",
    *,
    optional: bool = False,
) -> None:
    """The positional TARGET."""
    parser.add_argument("target", metavar="PID|CAPTURE", help=help_text, nargs="?" if optional else None)


def chosen(args: argparse.Namespace, command: str) -> int | Path:
    """What `args` names, by -c or by position (with -c, the position is the range)."""
    if args.capture:
        if args.target is not None:
            args.range, args.target = args.target, None
        return Path(args.capture)
    if args.target is None:
        raise UsageError(f"{command} needs a process id or a capture")
    return parse(args.target)
