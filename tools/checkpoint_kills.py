"""Kill pagelens at random moments of checkpoints and of rollbacks of busy programs (results in docs/checkpoint.md).

  python tools/checkpoint_kills.py [KILLS] [SEED]     (default 200 of each; exit code 1 on harm that is not allowed)

What is checked: tests/support/kills.py.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from support import kills  # noqa: E402 - after the path of the tree, likewise below
from support.subjects import Subjects  # noqa: E402 - see above


def main() -> None:
    """All of them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        subjects = Subjects(Path(name))
        for what in ("checkpoints", "rollbacks", "fast rollbacks"):
            rng, directory = random.Random(seed), Path(name) / what.replace(" ", "_")
            directory.mkdir()
            if what == "checkpoints":
                seen = kills.of_checkpoints(count, subjects, directory, rng)
            else:
                seen = kills.of_rollbacks(count, subjects, directory, rng, fast=what.startswith("fast"))
            print(f"{count} kills of {what}, seed {seed}: {dict(seen)}", flush=True)


if __name__ == "__main__":
    main()
