"""Faults that a handler in user space answered, by the ioctls at hand."""

from __future__ import annotations

import numpy as np
import pytest

from pagelens.vm import Prot, Snapshot, Vma, VmaList
from pagelens.why import classify_facts
from pagelens.why.facts import Call, Facts, Faults

BASE = 0x7F0000000000
COPY = 0xC028AA03


@pytest.mark.parametrize(
    ("latency", "copied", "page", "cause"),
    [
        (3_600, (98_000, 98_800), 0, "userfaultfd"),  # a handler on another CPU that was awake
        (3_600, (98_000, 98_800), 1, "first-write"),  # it answered somebody else
        (
            3_600,
            (96_000, 97_000),
            0,
            "first-write",
        ),  # it was at work before: another thread's fault had waited
        (9_000, (96_000, 97_000), 0, "userfaultfd"),
    ],
)
def test_a_handler_may_answer_at_once(latency: int, copied: tuple[int, int], page: int, cause: str) -> None:
    one = np.ones(1, np.int64)
    faults = Faults(
        seq=one,
        time=one * 100_000,
        latency=one * latency,
        mm=one,
        tid=one * 5,
        addr=(one * BASE).astype(np.uint64),
        ip=np.zeros(1, np.uint64),
        error=one * 6,
        call=-one,
        user=np.ones(1, bool),
        major=np.zeros(1, bool),
        failed=np.zeros(1, bool),
        new=-one,
    )
    vma = Vma(BASE, BASE + 16 * 4096, Prot(3), vm_flags=frozenset({"um"}))
    answer = Call(2, *copied, 1, 6, "ioctl", (3, COPY, 0, BASE + page * 4096, 1 << 20, 4096), 0)
    facts = Facts(faults, (answer,), (), {1: Snapshot(5, 0, VmaList([vma]))}, {}, {"calls": True})
    assert classify_facts(facts).of(0).cause == cause
