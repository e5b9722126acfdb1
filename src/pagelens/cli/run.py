"""`pagelens run`."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import stat
import sys
from pathlib import Path

from pagelens.cli.recording import (
    add_recording_arguments,
    default_capture,
    print_summary,
    recording_settings,
)
from pagelens.vm.errors import PagelensError, UsageError


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
        add_recording_arguments(parser, "at exec and exit")
        parser.add_argument(
            "--method",
            choices=("auto", "bpf", "perf"),
            default="auto",
            help="bpf: everything, needs root; perf: own processes, user mode; auto: bpf, else perf",
        )
        parser.add_argument(
            "--calls",
            choices=("auto", "ptrace"),
            default="auto",
            help="ptrace: without BPF, see memory calls too, by two stops of every system call (slow);"
            " implies --method perf",
        )
        parser.add_argument(
            "--until",
            choices=("tree", "program"),
            default="tree",
            help="record until all that it started is gone too (default), or until it is gone itself",
        )
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
            sys.stderr.write(f"pagelens: {error.strerror}: {error.filename or 'the capture'}\n")
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


def _record(args: argparse.Namespace, path: str, command: list[str]) -> int:
    from pagelens.capture.recorder import Recorder

    settings = recording_settings(args)
    settings.until, settings.method = args.until, args.method
    if args.calls == "ptrace":
        if args.method == "bpf":
            raise UsageError("--calls ptrace is for --method perf; BPF sees the calls itself")
        if args.snapshot == "none":
            raise UsageError("--calls ptrace needs snapshots: without them there is no tracer")
        settings.method, settings.calls = "perf", "ptrace"
    capture = Path(args.capture) if args.capture else default_capture(command[0])
    recorder = Recorder(capture, settings, command=command, force=args.force)
    result = recorder.run(path, command)
    if result.exec_errno:
        import shutil

        from pagelens.linux.launch import why_exec_failed

        shutil.rmtree(capture, ignore_errors=True)
        sys.stderr.write(f"pagelens: {command[0]}: {why_exec_failed(path, result.exec_errno)}\n")
        return 127 if result.exec_errno == 2 else 126
    print_summary(args, capture, result.summary, result.notes)
    return _end_like(result.status)


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
