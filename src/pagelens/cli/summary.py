"""`pagelens summary`."""

from __future__ import annotations

import argparse
from typing import Any

from pagelens.cli.output import add_output_arguments, emit_object


class Command:
    """What a capture holds, and how complete it is.

    recorded + gup + lost = what the kernel counted; what is left over is printed as unexplained.

      pagelens summary out.plens
      pagelens summary -c out.plens --format json
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("capture_path", nargs="?", metavar="CAPTURE", help="a capture")
        parser.add_argument("-c", "--capture", metavar="DIR", help="likewise")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Exit code 0, also for a lossy capture: the verdict is in `status`."""
        from pagelens.capture.directory import CaptureDirectory
        from pagelens.capture.overview import lines
        from pagelens.vm.errors import UsageError
        from pagelens.why import known, summary_lines

        path = args.capture or args.capture_path
        if not path:
            raise UsageError("summary needs a capture: pagelens summary DIR")
        capture = CaptureDirectory(path)
        summary, fields = capture.meta.get("summary"), known(capture)
        if not summary or fields is None:
            summary, fields = _read(path, summary)
        summary |= {k: fields[k] for k in ("causes", "unknown_share", "ambiguous_share", "agreement")}
        text = [*lines(capture, summary, fields["overview"]), "causes", *summary_lines(fields)]
        emit_object(args, summary, "\n".join(text))
        return 0


def _read(path: str, summary: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    # All events: the first time, or where the recorder was killed or a part has changed.
    from pagelens.capture.reader import Capture
    from pagelens.capture.summary import summarize
    from pagelens.why import conclusions

    capture = Capture(path)
    return summary or summarize(capture), conclusions(capture)
