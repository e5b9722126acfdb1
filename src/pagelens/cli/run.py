"""`pagelens run`."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import stat
import sys
from pathlib import Path

from pagelens.vm.errors import PagelensError, UsageError

_DETAILS = ("lean", "normal", "full")


class Command:
    """Record a program and all that it starts: every page fault, every call that shapes memory, its tasks.

    The program gets the terminal, the standard streams and the signals as if it ran alone, and `run` ends
    as it ends (125: pagelens failed before the start; 126: not executable; 127: not found). The summary
    goes to stderr.

      pagelens run -- gcc -O2 file.c
      pagelens run -c out.plens --detail lean -- ./server

    Snapshots at exec and exit use ptrace: a debugger, strace or LeakSanitizer inside the program then cannot
    attach. `--snapshot none` uses no ptrace.
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument(
            "-c", "--capture", metavar="DIR", help="where to write (default: NAME.plens here)"
        )
        parser.add_argument("--force", action="store_true", help="overwrite a capture")
        parser.add_argument(
            "--detail",
            choices=_DETAILS,
            default="normal",
            help="lean: no stacks, error codes, latencies, failed faults, switches; full: as normal, for now",
        )
        parser.add_argument(
            "--snapshot",
            choices=("full", "maps", "none"),
            default="full",
            help="at exec and exit: maps, page states and smaps; only maps; nothing, and no ptrace",
        )
        parser.add_argument(
            "--method",
            choices=("auto", "bpf", "perf"),
            default="auto",
            help="bpf: everything, needs root; perf: own processes, user mode; auto: bpf, else perf",
        )
        parser.add_argument("--ring-size", metavar="BYTES", default="8M", help="per CPU (default: 8M)")
        parser.add_argument("--max-size", metavar="BYTES", default="0", help="keep only the newest events")
        parser.add_argument(
            "--until",
            choices=("tree", "program"),
            default="tree",
            help="record until all that it started is gone too (default), or until it is gone itself",
        )
        parser.add_argument("--no-switches", action="store_true", help="no context switches")
        parser.add_argument("--summary-json", metavar="FILE", help="write the summary as JSON")
        parser.add_argument("-q", "--quiet", action="store_true", help="no summary on stderr")
        parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ARG…", help="the program")

    def run(self, args: argparse.Namespace) -> int:
        """Returns the program's code, or dies by its signal."""
        command = args.command[1:] if args.command[:1] == ["--"] else args.command
        if not command:
            raise UsageError("run needs a program: pagelens run -- CMD ARG…")
        try:
            path, code = find_program(command[0])
            if code:
                reason = "not found" if code == 127 else "not executable"
                sys.stderr.write(f"pagelens: {command[0]}: {reason}\n")
                return code
            return _record(args, path, command)
        except PagelensError as error:
            sys.stderr.write(f"pagelens: {error}\n")
            return 125
        except OSError as error:
            sys.stderr.write(f"pagelens: {error.strerror}: {error.filename or command[0]}\n")
            return 125


def find_program(name: str) -> tuple[str, int]:
    """(path, 0), or ("", 126) where it is there but not executable, or ("", 127)."""
    candidates = [name] if "/" in name else [f"{d or '.'}/{name}" for d in os.get_exec_path()]
    code = 127
    for candidate in candidates:
        try:
            mode = Path(candidate).stat().st_mode
        except PermissionError:
            code = 126
            continue
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate, 0
        code = 126
    return "", code


def parse_size(text: str) -> int:
    """Bytes of "64K", "8M", "1G" or a plain number. UsageError otherwise."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, shift = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 0)
    try:
        value = int(float(number) * (1 << shift))
    except ValueError:
        raise UsageError(f"{text!r} is no size (examples: 64K, 8M, 1G)") from None
    if value < 0:
        raise UsageError(f"{text!r} is no size")
    return value


def default_capture(name: str) -> Path:
    """NAME.plens in the current directory, or NAME-2.plens, …: the first that is free."""
    base = Path(name).name
    path, n = Path(f"{base}.plens"), 1
    while path.exists():
        n += 1
        path = Path(f"{base}-{n}.plens")
    return path


def _record(args: argparse.Namespace, path: str, command: list[str]) -> int:
    from pagelens.capture.recorder import Recorder, Settings

    ring = parse_size(args.ring_size)
    if ring < 4096 or ring & (ring - 1):
        raise UsageError("--ring-size must be a power of two, at least 4096")
    settings = Settings(
        detail=args.detail,
        snapshot=args.snapshot,
        ring_size=ring,
        max_size=parse_size(args.max_size),
        until=args.until,
        switches=False if args.no_switches else None,
        method=args.method,
    )
    capture = Path(args.capture) if args.capture else default_capture(command[0])
    recorder = Recorder(capture, settings, command=command, force=args.force)
    result = recorder.run(path, command)
    if result.exec_errno:
        import shutil

        shutil.rmtree(capture, ignore_errors=True)
        sys.stderr.write(f"pagelens: {command[0]}: {os.strerror(result.exec_errno)}\n")
        return 127 if result.exec_errno == 2 else 126
    _report(args, capture, result.summary, result.notes)
    return _end_like(result.status)


def _report(args: argparse.Namespace, capture: Path, summary: dict[str, object], notes: list[str]) -> None:
    import json

    from pagelens.capture.summary import text

    causes = _causes(capture, summary) if args.summary_json or not args.quiet else []
    try:
        if args.summary_json:
            Path(args.summary_json).write_text(json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        sys.stderr.write(f"pagelens: {error.strerror}: {args.summary_json}\n")
    if not args.quiet:
        lines = [f"pagelens: {capture}", *("  " + line for line in text(summary).splitlines())]
        lines += ["  causes", *("  " + line for line in causes)] if causes else []
        lines += [f"  note      {note}" for note in notes]
        lines.append(f"  next      pagelens why {capture} | pagelens faults {capture}")
        sys.stderr.write("\n".join(lines) + "\n")


def _causes(capture: Path, summary: dict[str, object]) -> list[str]:
    # Whatever goes wrong here, the program's own end is what we must pass on.
    try:
        from pagelens.capture.reader import Capture
        from pagelens.why import conclusions, summary_lines

        fields = conclusions(Capture(capture))
        summary.update({k: fields[k] for k in ("causes", "unknown_share", "agreement")})
        return summary_lines(fields)
    except Exception as error:
        if os.environ.get("PAGELENS_TRACEBACK"):
            raise
        return [f"not determined: {type(error).__name__}: {error}"]


def _end_like(status: int | None) -> int:
    # The shell that waits for us must see what the program did.
    if status is None or status < 0:
        return 125
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        sys.stdout.flush()
        sys.stderr.flush()
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        return 128 + number
    return os.WEXITSTATUS(status)
