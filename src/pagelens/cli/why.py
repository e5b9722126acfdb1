"""`pagelens why`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pagelens.cli.output import add_output_arguments, emit, write_text
from pagelens.cli.table import Col


class Command:
    """Why the faults of a capture came; why a page is as it is.

    Without an address: all causes, most frequent first. With one: every fault on its page, and what each
    verdict rests on. `unknown` and `ambiguous` are verdicts, and are shown.

      pagelens why out.plens
      pagelens why out.plens 7f3c5a000010
      pagelens why out.plens --vma 12
      pagelens why out.plens --page 7f3c5a000000+64k --format json
    """

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Arguments."""
        parser.add_argument("capture_path", nargs="?", metavar="CAPTURE", help="a capture")
        parser.add_argument("address", nargs="?", metavar="ADDR", help="an address, hexadecimal")
        parser.add_argument("-c", "--capture", metavar="DIR", help="the capture")
        parser.add_argument("--vma", type=int, metavar="N", help="vma N of the last snapshot (of --mm)")
        parser.add_argument("--page", metavar="START[+SIZE|-END]", help="a page, or a range of pages")
        parser.add_argument("--mm", type=int, metavar="N", help="only this address space of the capture")
        add_output_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Exit code 0."""
        from pagelens.capture.reader import Capture
        from pagelens.vm.errors import UsageError
        from pagelens.vm.units import AddrRange
        from pagelens.why import classify, views

        path, address = args.capture or args.capture_path, args.address
        if args.capture and args.capture_path and address is None:
            address = args.capture_path
        if not path:
            raise UsageError("why needs a capture: pagelens why DIR")
        if sum(x is not None for x in (address, args.vma, args.page)) > 1:
            raise UsageError("give one of ADDR, --vma and --page")
        wanted: AddrRange | None = None
        at = None
        if args.page is not None and ("+" in args.page or "-" in args.page):
            wanted = AddrRange.parse(args.page)
        elif address is not None or args.page is not None:
            at = _address(str(address or args.page))
        capture = Capture(path)
        result = classify(capture)
        if args.vma is not None:
            answer = views.vma(capture, result, args.vma, args.mm)
        elif wanted is not None:
            answer = views.span(capture, result, wanted.start, wanted.end, args.mm, "range")
        elif at is not None:
            answer = views.page(capture, result, at, args.mm)
        else:
            answer = views.whole(capture, result)
        answer_out(args, answer, capture.missing)
        return 0


def answer_out(args: argparse.Namespace, answer: dict[str, Any], missing: list[str]) -> None:
    """Print in the asked format."""
    from pagelens.why.views import table_rows

    if args.format == "json":
        write_text(args, json.dumps(answer, indent=1) + "\n")
        return
    rows = table_rows(answer)
    subject = answer["subject"]
    single = any("what" in row for row in rows)
    if single and args.format == "table":
        write_text(args, page_text(answer))
        return
    columns = [Col("cause"), Col("confidence")]
    if single:
        columns += [Col("seq", kind="int"), Col("what"), Col("latency_ns", "latency", "ns")]
    else:
        columns += [
            Col("faults", kind="int"),
            Col("pages", kind="int", spare=3),
            Col("share", kind="share", spare=2),
            Col("time_ns", "time", "ns"),
            Col("title", "meaning"),
        ]
    if args.format != "table":
        columns += [Col("remedy"), Col("doc", spare=1)]
    head = " ".join(f"{k} {v}" for k, v in subject.items() if k not in ("capture", "notes"))
    emit(args, columns, rows, title=head, notes=[*subject.get("notes", []), *notes(answer), *missing])


def notes(answer: dict[str, Any]) -> list[str]:
    """Method and completeness."""
    shares = ", ".join(f"{k} {v:.4%}" for k, v in answer["agreement"].items() if v is not None)
    out = ["method: the capture's calls replayed, each fault judged by the rules of docs/causes.md"]
    if shares:
        out.append(f"agreement of the replay with the kernel's last snapshots: {shares}")
    return out


def page_text(answer: dict[str, Any]) -> str:
    """Every fault on a page, with its evidence, as lines."""
    from pagelens.why.views import title

    subject = answer["subject"]
    lines = [f"page of {subject['address']}: {subject['faults']} faults"]
    for number, verdict in enumerate(answer["verdicts"], 1):
        lines.append(f"\n{number}. {verdict['cause']} ({verdict['confidence']}): {title(verdict['cause'])}")
        for row in verdict["evidence"]:
            seq = f"seq {row['seq']:<8}" if row.get("seq") is not None else " " * 12
            where = f"  [{row['where']}]" if row.get("where") else ""
            error = f"  error {row['error_code']:#x}" if row.get("error_code") is not None else ""
            lines.append(f"   {seq} {row['role']}: {row['what']}{error}{where}")
        if verdict["remedy"]:
            lines.append(f"   remedy: {verdict['remedy']}")
    lines += ["", *notes(answer)]
    return "\n".join(lines) + "\n"


def _address(text: str) -> int:
    from pagelens.vm.errors import UsageError

    try:
        return int(text, 16)
    except ValueError:
        raise UsageError(f"not an address: {text!r} (hexadecimal, as in maps)") from None
