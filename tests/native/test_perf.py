"""perf's records into ours (native/perf/records.c), with blocks of exactly their size, always under sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"


def test_records(tmp_path: Path) -> None:
    program = tmp_path / "perf_records"
    flags = (
        "-g",
        "-O1",
        "-D_GNU_SOURCE",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-pthread",
    )
    source = HERE / "perf_records.c"
    built = subprocess.run(
        ["gcc", *flags, f"-I{NATIVE}", "-o", program, source], check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([program], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    totals, records = done.stdout.splitlines()
    assert totals == "recorded 20002 lost 12 gone 10001 uncounted 10000 started 20000"
    # Of 16 new names 8 came with an exec; stacks end at 64 frames, contexts are left out.
    assert records.startswith("faults 20002 calls 308 forks 20000 execs 8 exits 1 frames ")
