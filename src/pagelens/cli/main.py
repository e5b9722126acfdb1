"""Entry point: the table of commands, lazy imports, exit codes.

`pagelens --help` must not import a command (start-up time), so the table holds one line of help for each.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from pagelens import __version__
from pagelens.vm.errors import PagelensError, UsageError

# command -> (module, one line of help). A command whose module has not landed is not shown.
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("pagelens.cli.doctor", "what works here, what it unlocks, how to grant the rest"),
    "run": ("pagelens.cli.run", "record a program: faults, memory system calls, snapshots"),
    "attach": ("pagelens.cli.attach", "record a process that runs already"),
    "case": ("pagelens.cli.case", "questions people really ask, answered live"),
    "summary": ("pagelens.cli.summary", "what a capture holds, and how complete it is"),
    "faults": ("pagelens.cli.faults", "faults by stack, vma, thread, process or kind"),
    "why": ("pagelens.cli.why", "why a page is as it is, or why its faults came"),
    "query": ("pagelens.cli.query", "SQL over a capture"),
    "map": ("pagelens.cli.map", "the memory map, named as a person would"),
    "pages": ("pagelens.cli.pages", "state of pages: present, dirty, shared, huge, frames"),
    "diff": ("pagelens.cli.diff", "what changed between two moments, and by which stores"),
    "top": ("pagelens.cli.top", "who faults now"),
    "dirty": ("pagelens.cli.dirty", "pages written per epoch: rate, working set, pre-copy forecast"),
    "checkpoint": ("pagelens.cli.checkpoint", "save the memory of a process"),
    "verify": ("pagelens.cli.verify", "check a checkpoint"),
    "rollback": ("pagelens.cli.rollback", "put a process back to a checkpoint, in place"),
    "read": ("pagelens.cli.read", "read memory out of a checkpoint"),
    "merge": ("pagelens.cli.merge", "make a checkpoint stand alone, without its parents"),
    "prune": ("pagelens.cli.prune", "drop checkpoints of a chain, or merge them"),
    "export": ("pagelens.cli.export", "write a checkpoint or a capture in another format"),
    "serve-pages": ("pagelens.cli.serve_pages", "page server for CRIU or Firecracker"),
    "shared": ("pagelens.cli.shared", "pages that processes share, and who broke it"),
    "thp": ("pagelens.cli.thp", "huge pages: where, why not, what they cost"),
    "lockcheck": ("pagelens.cli.lockcheck", "which faults remain after mlockall"),
    "advise": ("pagelens.cli.advise", "madvise another process's range, and prove the effect"),
    "model": ("pagelens.cli.model", "the executable model: run, step, verify, fuzz, grade, serve"),
    "report": ("pagelens.cli.report", "HTML report of a capture"),
    "recover": ("pagelens.cli.recover", "finish a capture whose recorder was killed"),
}

EPILOG = """\
exit codes: 0 done; 1 a check found something; 2 usage; 3 a capability is missing; 4 the target is gone;
5 input damaged or output incomplete; 70 a bug in pagelens. `run` ends as the program ends."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a write


class Command(Protocol):
    """What a module of this package provides as `Command`: docstring = help."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit code."""
        ...


def _formatter() -> Any:
    # rich's help only where a person looks at it: its import costs more than the whole of --help.
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        from rich_argparse import RawDescriptionRichHelpFormatter

        return RawDescriptionRichHelpFormatter
    return argparse.RawDescriptionHelpFormatter


class _Parser(argparse.ArgumentParser):
    # argparse exits by itself with code 2 and a usage block; one clear line is kinder.
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\n(see: {self.prog} --help)")


def available() -> dict[str, tuple[str, str]]:
    """The commands whose module is installed."""
    return {name: entry for name, entry in COMMANDS.items() if find_spec(entry[0]) is not None}


def top_help() -> str:
    """The text of `pagelens --help`."""
    lines = [
        "usage: pagelens COMMAND [ARG …]",
        "",
        "The pages of a process, the faults that made them, and why.",
        "",
        "commands:",
        *(f"  {name:<12} {text}" for name, (_, text) in available().items()),
        "",
        "  pagelens COMMAND --help   what a command takes",
        "  pagelens --version",
        "",
        EPILOG,
    ]
    return "\n".join(lines) + "\n"


def command_parser(name: str) -> tuple[argparse.ArgumentParser, Command]:
    """The parser of one command, and the command. Also feeds completion and man pages."""
    module_name, _ = COMMANDS[name]
    command: Command = importlib.import_module(module_name).Command()
    doc = (type(command).__doc__ or "").strip()
    parser = _Parser(
        prog=f"pagelens {name}", description=_dedent(doc), formatter_class=_formatter(), allow_abbrev=False
    )
    command.configure(parser)
    return parser, command


def _dedent(doc: str) -> str:
    first, _, rest = doc.partition("\n")
    import textwrap

    return first + "\n" + textwrap.dedent(rest)


def parse(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """As parse_args, but options may stand between positional arguments too (`pages PID --frames RANGE`): argparse
    refuses that where the second one may be left out. UsageError."""
    try:
        return parser.parse_args(args)
    except UsageError:
        if "--" in args:  # what follows belongs to a program
            raise
        try:
            return parser.parse_intermixed_args(args)
        except (TypeError, UsageError):  # TypeError: subcommands, or a rest that is a program's
            pass
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Errors of ours become one sentence on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        out = sys.stdout if args else sys.stderr
        out.write(top_help())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        sys.stdout.write(f"pagelens {__version__}\n")
        return 0
    name = args[0]
    if name not in COMMANDS or name not in available():
        import difflib

        near = difflib.get_close_matches(name, available(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        sys.stderr.write(f"pagelens: no command {name!r}{hint} (see: pagelens --help)\n")
        return 2
    try:
        parser, command = command_parser(name)
        return command.run(parse(parser, args[1:]))
    except PagelensError as error:
        sys.stderr.write(f"pagelens: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        return _drop_output(0)  # the reader of our pipe has left (`| head`): not an error
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno is None or (error.errno in _FULL and not error.filename):
            raise
        sys.stderr.write(f"pagelens: {error.strerror}: {error.filename or name}\n")
        return 5 if error.filename else 70
    except Exception as error:
        if os.environ.get("PAGELENS_TRACEBACK"):
            raise
        sys.stderr.write(
            f"pagelens: bug: {type(error).__name__}: {error}"
            " (please report; PAGELENS_TRACEBACK=1 shows where)\n"
        )
        return 70


def entry() -> None:
    """Console script."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _drop_output(0)
    except OSError as error:  # a full disk behind `> FILE`: what was written there is not whole
        code = _drop_output(5)
        sys.stderr.write(f"pagelens: cannot write the output: {error.strerror}\n")
    sys.exit(code)


def _drop_output(code: int) -> int:
    # Keeps Python from complaining at exit about what it could not write.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    entry()
