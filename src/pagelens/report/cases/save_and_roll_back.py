"""Case 4. A checkpoint of a process: full, then incremental, verified, and rolled back in place."""

from __future__ import annotations

from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.fast import Checkpoint
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.verify import verify
from pagelens.report.cases.lab import Answer, Lab, Stepped
from pagelens.vm.errors import CapabilityMissingError


def run(lab: Lab) -> Answer:
    """Run it."""
    answer = Answer(4, "Can I save a process, and put it back?", reproduce="pagelens case 4")
    stepped = lab.start([lab.compile("save_and_roll_back")])
    pid = int(stepped.until("filled")["pid"])
    before = _sum(stepped, "c")
    full = dump(pid, lab.path / "full")
    changed = _sum(stepped, "w")
    part = dump(pid, lab.path / "part", parent=lab.path / "full")
    checked = verify(lab.path / "part")
    answer.figures = {
        "full_pages": full.captured_pages,
        "incremental_pages": part.stored_pages,
        "verified": checked.ok,
        "stopped_ns": full.stopped_ns,
    }
    answer.say("full", f"{full.captured_pages:,} pages, held {full.stopped_ns / 1e6:.0f} ms")
    answer.say("then", f"{part.stored_pages:,} pages differ from it (a fifth of 12,800 was written)")
    answer.say("verify", "ok" if checked.ok else "; ".join(map(str, checked.problems[:2])))
    from pagelens.checkpoint.rollback import rollback

    done = rollback(pid, Stored.open(lab.path / "full"), accept=["offsets", "signals"])
    after = _sum(stepped, "c")
    same = after == before != changed
    answer.figures |= {"rolled_back_pages": done.written_pages, "rollback_ns": done.stopped_ns, "same": same}
    answer.say(
        "back",
        f"{done.written_pages:,} pages written back in {done.stopped_ns / 1e6:.0f} ms; the program's own "
        f"checksum is " + ("that of the first checkpoint" if same else "NOT that of the first checkpoint"),
    )
    held = _from_memory(stepped, pid, before, answer)
    stepped.finish()
    good = same and checked.ok and answer.figures.get("memory_same", True)
    answer.headline = (
        f"full {full.captured_pages:,} pages, then {part.stored_pages:,}; verify ok; rolled back in "
        f"{done.stopped_ns / 1e6:.0f} ms" + (f", from memory in {held / 1e6:.0f} ms" if held else "")
        if good
        else "FAILED"
    )
    answer.complete = bool(good and full.complete)
    answer.method = f"{full.method}; contents compared by the program itself"
    return answer


def _from_memory(stepped: Stepped, pid: int, before: str, answer: Answer) -> int:
    """The same by `pagelens.Checkpoint`: how long the rollback held the process, ns; 0 where it is not to be had."""
    try:
        with Checkpoint.take(pid) as point:
            _sum(stepped, "w")
            done = point.rollback(accept=["offsets", "signals"])
    except CapabilityMissingError as error:
        answer.say("memory", f"not here: {error}")
        return 0
    same = _sum(stepped, "c") == before
    answer.figures |= {"memory_pages": done.written_pages, "memory_ns": done.held_ns, "memory_same": same}
    answer.say(
        "memory",
        f"{done.written_pages:,} pages in {done.held_ns / 1e6:.1f} ms where the checkpoint lies in memory "
        "(pagelens.Checkpoint)" + ("" if same else "; the checksum DIFFERS"),
    )
    return done.held_ns


def _sum(stepped: Stepped, what: str) -> str:
    assert stepped.process.stdin is not None
    stepped.process.stdin.write(what)
    stepped.process.stdin.flush()
    return stepped.until("ready")["sum"]
