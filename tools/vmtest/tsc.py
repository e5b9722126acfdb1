"""The frequency of this machine's time stamp counter, which a guest under TCG sees as its own.

A guest measures it at boot against an emulated timer, and under load it measures wrong: its clock then ran
up to four times too fast, and every time limit in it was wrong (seen with 6.1 on a busy machine). So it is
told.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
_CODE = bytes.fromhex("0f3148c1e2204809d0c3")


@functools.cache
def khz() -> int:
    """Kilohertz, measured over a fifth of a second against CLOCK_MONOTONIC."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_CODE)
        view = (ctypes.c_char * len(_CODE)).from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(view))

        def moment() -> tuple[int, int]:
            # The closest pair of a few: an interruption between the two readings only makes a pair worse.
            pairs = []
            for _ in range(20):
                before = time.monotonic_ns()
                ticks = read()
                after = time.monotonic_ns()
                pairs.append((after - before, (before + after) // 2, ticks))
            _, when, ticks = min(pairs)
            return when, ticks

        begin = moment()
        time.sleep(0.2)
        end = moment()
        del view
    return round((end[1] - begin[1]) * 1_000_000 / (end[0] - begin[0]))
