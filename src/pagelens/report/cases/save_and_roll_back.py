"""Case 4. A checkpoint of a process: full, then incremental, verified, and rolled back in place."""

from __future__ import annotations

from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.verify import verify
from pagelens.report.cases.lab import Answer, Lab, Stepped


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
    stepped.finish()
    same = after == before != changed
    answer.figures |= {"rolled_back_pages": done.written_pages, "rollback_ns": done.stopped_ns, "same": same}
    answer.say(
        "back",
        f"{done.written_pages:,} pages written back in {done.stopped_ns / 1e6:.0f} ms; the program's own "
        f"checksum is " + ("that of the first checkpoint" if same else "NOT that of the first checkpoint"),
    )
    answer.headline = "verify ok, rolled back" if same and checked.ok else "FAILED"
    answer.complete = same and checked.ok and full.complete
    answer.method = f"{full.method}; contents compared by the program itself"
    return answer


def _sum(stepped: Stepped, what: str) -> str:
    assert stepped.process.stdin is not None
    stepped.process.stdin.write(what)
    stepped.process.stdin.flush()
    return stepped.until("ready")["sum"]
