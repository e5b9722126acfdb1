"""The summary of a recording: the completeness equation, and what scripts may rely on.

recorded + gup + lost = counted (min_flt + maj_flt), per thread and in sum; what is left over is
`unexplained`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagelens.capture.reader import Capture

METHOD_BPF = "BPF: completed-fault events and task counters, filtered in the kernel"


def build(
    *,
    counted_minor: int,
    counted_major: int,
    recorded: int,
    gup: int,
    failed: int | None,
    lost: int,
    kernel_mode_unseen: int = 0,
    uncounted: int = 0,
    status: str | None = None,
    complete: bool = True,
    method: str = METHOD_BPF,
) -> dict[str, Any]:
    """The object of `--summary-json` (docs/schemas/summary.json).

    failed: None where the detail does not show failed faults. status: None to derive it: "complete" when
    nothing is lost or unexplained, else "losses". uncounted: recorded faults of tasks whose counters are not
    in the sum.
    """
    unexplained = counted_minor + counted_major - (recorded - uncounted) - gup - lost - kernel_mode_unseen
    whole = complete and not unexplained and not lost and not kernel_mode_unseen
    return {
        "status": status or ("complete" if whole else "losses"),
        "faults": {
            "recorded": recorded,
            "counted_minor": counted_minor,
            "counted_major": counted_major,
            "gup": gup,
            "failed": failed,
            "lost": lost,
            "unexplained": unexplained,
            "kernel_mode_unseen": kernel_mode_unseen,
        },
        "causes": [],
        "unknown_share": None,
        "method": method,
        "complete": whole and (status in (None, "complete")),
        "agreement": {"vmas": None, "pages": None, "faults": None, "accounting": None},
    }


def summarize(capture: Capture) -> dict[str, Any]:
    """From the tables (a recovered capture has no totals of the kernel beyond its finished tasks)."""
    import pyarrow.compute as pc

    tasks = capture.table("tasks")

    def total(name: str) -> int:
        return int(pc.sum(tasks.column(name)).as_py() or 0)

    events = capture.table("events", ["kind", "failed"])
    faults = events.filter(pc.equal(events.column("kind"), "fault"))
    failed = int(pc.sum(faults.column("failed")).as_py() or 0)
    summary = build(
        counted_minor=total("min_flt"),
        counted_major=total("maj_flt"),
        recorded=faults.num_rows - failed,
        gup=total("gup"),
        failed=failed,
        lost=total("lost"),
        status="recovered",
    )
    # Tasks that still ran have events here but no counters: the equation cannot be drawn up.
    summary["faults"]["unexplained"] = None
    return summary


def text(summary: dict[str, Any]) -> str:
    """Lines for a person."""
    faults = summary["faults"]
    counted = faults["counted_minor"] + faults["counted_major"]
    failed = "not recorded" if faults["failed"] is None else f"{faults['failed']:,}"
    unexplained = faults["unexplained"]
    lines = [
        f"faults    {faults['recorded']:,} recorded + {faults['gup']:,} made by the kernel for calls (gup)"
        f" + {faults['lost']:,} lost",
        f"          = {counted:,} counted by the kernel ({faults['counted_minor']:,} minor,"
        f" {faults['counted_major']:,} major); unexplained"
        f" {'unknown' if unexplained is None else f'{unexplained:,}'}; failed, apart: {failed}",
    ]
    if faults["kernel_mode_unseen"]:
        lines.append(
            f"          {faults['kernel_mode_unseen']:,} counted but not visible to us (kernel mode, gup)"
        )
    lines.append(f"status    {summary['status']}; {summary['method']}")
    return "\n".join(lines)
