"""Whether a page whose sharers are gone was reused or copied: what the fault took, what two looks at its frame say, and
the program."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pagelens.why import classify_facts
from pagelens.why.classified import Classified
from pagelens.why.load import load
from support.recording import assert_complete, record

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native", "pfn")

PROGRAM = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
P, N = 4096, 64
pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
def frames(base): return [e & (1 << 55) - 1 for e in struct.unpack(f"{N}Q", os.pread(pagemap, 8 * N, base // P * 8))]
def put(base, i): ctypes.memset(base + i * P, 1, 1)
kept, gone = (libc.mmap(None, N * P, 3, 0x22, -1, 0) for _ in range(2))
for i in range(N): put(kept, i); put(gone, i)
r, w = os.pipe()
class iovec(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
held = iovec(kept, 8 * P)                 # eight pages that a pipe refers to: they will have to be copied
assert libc.vmsplice(w, ctypes.byref(held), 1, 0) == 8 * P
child = os.fork()
if child == 0: os._exit(0)
assert os.waitpid(child, 0)[1] == 0
before = frames(kept)
for i in range(N): put(kept, i); put(gone, i)
after = frames(kept)
libc.munmap(gone, N * P)                  # and nobody will have looked at these
print(kept, gone, *[a == b for a, b in zip(before, after)])
"""


def test_reused_or_copied(tmp_path: Path) -> None:
    run = record(tmp_path, [sys.executable, "-c", PROGRAM])
    assert run.returncode == 0, run.stderr
    assert_complete(run)
    words = run.stdout.split()
    kept, gone = int(words[0]), int(words[1])
    reused = [word == "True" for word in words[2:]]
    assert reused[:8] == [False] * 8
    assert sum(reused) > 48
    facts = load(run.capture)
    # By what the kernel took for the fault; and by frames alone, as with a capture of old.
    blind = replace(facts, faults=replace(facts.faults, new=np.full(len(facts.faults), -1, np.int8)))
    forked = int(run.rows("kind = 'task' and name = 'fork'")[0]["time_ns"])

    def verdicts(result: Classified, base: int) -> dict[int, tuple[str, str, str]]:
        faults = result.run.faults
        inside = (faults.addr >= base) & (faults.addr < base + 64 * 4096) & (faults.time > forked)
        rows = inside.nonzero()[0].tolist()
        found = [(int(faults.addr[r] - base) >> 12, result.of(r)) for r in rows]
        return {page: (v.cause, v.confidence, v.why) for page, v in found}

    for known, gone_are in ((facts, "certain"), (blind, "ambiguous")):
        result = classify_facts(known)
        seen = verdicts(result, kept)
        assert sorted(seen) == list(range(64))
        for page, (cause, confidence, sentence) in seen.items():
            assert cause == "sharers-gone"
            assert confidence == ("certain" if reused[page] else "likely")
            assert ("it was reused" if reused[page] else "it was copied") in sentence
        assert {v[:2] for v in verdicts(result, gone).values()} == {("sharers-gone", gone_are)}
    rows = run.rows(f"kind = 'fault' and addr >= {kept} and addr < {kept + 64 * 4096} and time_ns > {forked}")
    assert [row["new_pages"] for row in sorted(rows, key=lambda r: r["addr"])] == [int(not r) for r in reused]
    # The program's own pages: writes to absent ones tell nothing.
    assert run.rows("new_pages is not null and error_code & 3 <> 3") == []
    assert all(row["pfn"] for row in run.capture.table("frames").to_pylist())


def test_no_frames_of_vfork_and_threads(tmp_path: Path) -> None:
    program = """
import subprocess, threading
subprocess.run(["true"], close_fds=False)
threading.Thread(target=id, args=(1,)).start()
"""
    run = record(tmp_path, [sys.executable, "-c", program])
    assert run.returncode == 0, run.stderr
    assert run.capture.table("frames").num_rows == 0
