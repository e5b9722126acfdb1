"""`pagelens doctor`."""

from __future__ import annotations

import argparse
import platform

from pagelens.cli.output import add_output_arguments, emit
from pagelens.cli.table import Col
from pagelens.linux import probe
from pagelens.vm.errors import UsageError

COLUMNS = (
    Col("capability"),
    Col("status"),
    Col("detail", "found"),
    Col("unlocks"),
    Col("fix"),
)


class Command:
    """What works here, what it unlocks, and the exact command that grants the rest.

    Each capability is tried, not guessed from the kernel's version.

      $ pagelens doctor
      $ pagelens doctor soft-dirty pagemap-scan --format json
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("capability", nargs="*", help="only these (default: all)")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Try, print."""
        unknown = [name for name in args.capability if name not in probe.names()]
        if unknown:
            raise UsageError(f"no capability {unknown[0]!r} (known: {', '.join(probe.names())})")
        found = [probe.status(name) for name in args.capability] or probe.capabilities()
        rows = [
            {"capability": c.name, "status": c.status, "detail": c.detail, "unlocks": c.unlocks, "fix": c.fix}
            for c in found
        ]
        notes = [f"kernel {platform.release()} {platform.machine()}; each line was tried just now"]
        if platform.machine() != "x86_64":
            notes.append("pagelens is for x86-64 with 4 KiB pages: on this machine figures may be wrong")
        emit(args, COLUMNS, rows, notes=notes)
        return 0
