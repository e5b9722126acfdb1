"""What `run` and `attach` have in common: arguments, where the capture goes, the summary."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagelens.vm.errors import UsageError
from pagelens.vm.units import parse_size

if TYPE_CHECKING:
    from pagelens.capture.session import Settings

_DETAILS = ("lean", "normal", "full")


def add_recording_arguments(parser: argparse.ArgumentParser, moments: str) -> None:
    """moments: when snapshots are taken, for the help."""
    parser.add_argument("-c", "--capture", metavar="DIR", help="where to write (default: NAME.plens here)")
    parser.add_argument("--force", action="store_true", help="overwrite a capture")
    parser.add_argument(
        "--detail",
        choices=_DETAILS,
        default="normal",
        help="lean: no stacks, error codes, latencies, failed faults, switches;"
        " full: stacks of programs without frame pointers too (1 KiB a fault)",
    )
    parser.add_argument(
        "--snapshot",
        choices=("full", "maps", "none"),
        default="full",
        help=f"{moments}: maps, page states and smaps; only maps; nothing, and no ptrace",
    )
    parser.add_argument(
        "--ring-size", metavar="BYTES", default="0", help="per CPU (default: 128M for all, at most 32M each)"
    )
    parser.add_argument("--max-size", metavar="BYTES", default="0", help="keep only the newest events")
    parser.add_argument("--no-switches", action="store_true", help="no context switches")
    parser.add_argument("--summary-json", metavar="FILE", help="write the summary as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary on stderr")


def recording_settings(args: argparse.Namespace) -> Settings:
    """From the arguments. UsageError where one makes no sense."""
    from pagelens.capture.session import Settings

    ring = parse_size(args.ring_size)
    if ring and (ring < 4096 or ring & (ring - 1)):
        raise UsageError("--ring-size must be a power of two, at least 4096")
    return Settings(
        detail=args.detail,
        snapshot=args.snapshot,
        ring_size=ring,
        max_size=parse_size(args.max_size),
        switches=False if args.no_switches else None,
    )


def default_capture(name: str) -> Path:
    """NAME.plens in the current directory, or NAME-2.plens, …: the first that is free."""
    base = Path(name).name
    path, n = Path(f"{base}.plens"), 1
    while path.exists():
        n += 1
        path = Path(f"{base}-{n}.plens")
    return path


def print_summary(args: argparse.Namespace, capture: Path, summary: dict[str, Any], notes: list[str]) -> None:
    """To stderr and to --summary-json, with the causes."""
    import json

    from pagelens.capture.summary import text

    causes = _causes(capture, summary)  # also where nobody asks: the capture carries them from now on
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


MOST_FAULTS = 5_000_000  # about 10 s and 2 GB: whoever waits for the program should not wait for us as well


def _causes(capture: Path, summary: dict[str, Any]) -> list[str]:
    # Whatever goes wrong here, the program's own end is what we must pass on.
    try:
        from pagelens.capture.reader import Capture
        from pagelens.why import conclusions, summary_lines

        if int(summary["faults"]["recorded"] or 0) > MOST_FAULTS:
            return [f"not determined here, more than {MOST_FAULTS:,} faults: pagelens why {capture}"]
        fields = conclusions(Capture(capture))
        summary.update({k: fields[k] for k in ("causes", "unknown_share", "ambiguous_share", "agreement")})
        return summary_lines(fields)
    except KeyboardInterrupt:
        return ["not determined: interrupted"]
    except Exception as error:
        if os.environ.get("PAGELENS_TRACEBACK"):
            raise
        return [f"not determined: {type(error).__name__}: {error}"]
