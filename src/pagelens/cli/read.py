"""pagelens read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pagelens.cli.output import write_file
from pagelens.vm.errors import UsageError
from pagelens.vm.units import parse_size


class Command:
    """Read memory out of a checkpoint: a hex dump, or the bytes themselves with --raw.

    pagelens read DIR 7f0000001000 256
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("checkpoint", type=Path, metavar="DIR")
        parser.add_argument("address", type=_address, help="hexadecimal")
        parser.add_argument("length", type=parse_size, nargs="?", default=256, help="bytes, or 4k, 1M")
        parser.add_argument("--raw", action="store_true", help="the bytes, not a dump")
        parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to FILE")
        parser.add_argument("--force", action="store_true", help="overwrite FILE")

    def run(self, args: argparse.Namespace) -> int:
        """Read and print."""
        from pagelens.checkpoint.stored import Stored

        try:
            data = Stored.open(args.checkpoint).read(args.address, args.length)
        except KeyError as error:
            raise UsageError(str(error.args[0])) from None
        shown = data if args.raw else hexdump(args.address, data).encode()
        if args.output:
            write_file(args.output, shown, args.force)
        elif args.raw:
            sys.stdout.buffer.write(shown)
        else:
            sys.stdout.write(shown.decode())
        return 0


def _address(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no hexadecimal address") from None


def hexdump(addr: int, data: bytes) -> str:
    """Sixteen bytes a line: address, hex, text; equal lines in a row become "*"."""
    lines, last, skipped = [], b"", False
    for at in range(0, len(data), 16):
        part = data[at : at + 16]
        if part == last and len(part) == 16:
            if not skipped:
                lines.append("*")
            skipped = True
            continue
        last, skipped = part, False
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in part)
        lines.append(f"{addr + at:012x}  {part[:8].hex(' '):<23}  {part[8:].hex(' '):<23}  {text}")
    return "\n".join([*lines, f"{addr + len(data):012x}"]) + "\n"
