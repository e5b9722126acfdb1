"""1,000,000 recorded faults to the printed causes: time and peak memory, against a C loop that only sums a
column.

One run, in one process each; the capture is made first and its derived tables are removed before the
measurement.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
PROGRAM = r"""
#include <sys/mman.h>
int main(void) {
  size_t n = 65536;
  char *p = mmap(0, n * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (int round = 0; round < 16; round++) {
    for (size_t i = 0; i < n; i++) p[i * 4096] = 1;
    madvise(p, n * 4096, MADV_DONTNEED);
  }
  return 0;
}
"""


def run(*command: str) -> tuple[float, float, int, str]:
    """(seconds, CPU seconds, peak KiB, output) of a command of pagelens."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pagelens.cli.main", *command],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert process.stdout is not None
    out = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, out
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, out


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = directory / "touch.c"
        source.write_text(PROGRAM)
        subprocess.run(["gcc", "-O1", "-o", directory / "touch", source], check=True)
        capture = directory / "c.plens"
        run("run", "-q", "--ring-size", "64M", "-c", str(capture), "--", str(directory / "touch"))
        shutil.rmtree(capture / "derived", ignore_errors=True)
        seconds, cpu, peak, out = run("summary", str(capture))
        print(out)
        again, _, _, _ = run("summary", str(capture))
        mib = peak // 1024
        print(f"1,048,576 faults to the printed summary: {seconds:.2f} s (CPU {cpu:.2f} s), peak {mib} MiB")
        print(f"the same again, causes derived already: {again:.2f} s")


if __name__ == "__main__":
    main()
