"""Long runs of the dirty-tracking oracle: python tools/dirty_oracle.py EPOCHS SEED [BACKEND] [OPERATIONS].

Prints one line: epochs, pages that had to be listed, missed, listed for no reason, extra by reason. Exit code
1 where anything was missed or wrong. Results are recorded in docs/dirty.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

from pagelens.dirty.track import track  # noqa: E402 (the path comes first)
from support.dirty_oracle import Judge, Subject  # noqa: E402
from support.subjects import Subjects  # noqa: E402


def main() -> int:
    epochs, seed = int(sys.argv[1]), int(sys.argv[2])
    backend = sys.argv[3] if len(sys.argv) > 3 else "auto"
    operations = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    extra: Counter[str] = Counter()
    must = missed = wrong = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        program = Subjects(Path(directory))("dirty_oracle")
        args = ("dropped",) if backend == "soft-dirty" else ()
        with Subject(program, *args) as subject, track(pid=subject.pid, backend=backend) as tracker:
            judge = Judge(tracker.semantics.extra)
            for i in range(epochs):
                truth = subject.go(seed + i, operations)
                verdict = judge(truth, tracker.epoch())
                must += verdict.must
                extra += verdict.extra
                if verdict.missed or verdict.wrong:
                    missed += verdict.missed.pages
                    wrong += sum(n for _, n, _ in verdict.wrong)
                    print(f"epoch {i} seed {seed + i}: missed {verdict.missed.pairs()} wrong {verdict.wrong}")
                    print([(hex(a), hex(b), kind, fresh) for a, b, kind, fresh in truth.arenas])
            name = tracker.backend
    print(
        f"{name}: {epochs} epochs from seed {seed}, {must} pages to list, missed {missed}, unexplained {wrong}, "
        f"extra {dict(extra)}, {time.monotonic() - began:.0f} s"
    )
    return 1 if missed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
