"""The drain (native/ring) on rings that the test fills: wrap, records in the making, damage, stacks, a full disk.

`./dev check` runs tests/native with the C core under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from pagelens.linux.drain import Drain
from support.rings import BATCH, BUSY, DISCARD, FAULT, HEAD, PAGE, ROWS, SWITCH, SYSCALL, Ring, record

RAW = 64


def test_records_around_the_end(tmp_path: Path) -> None:
    """Many times around a ring of one page, records across its end."""
    with Ring(tmp_path, at=PAGE - 24) as ring:
        for i in range(300):
            ring.put(record(FAULT, frames=(i, 7)))
            ring.put(record(SYSCALL, text=b"name\0\0\0\0"))
            assert ring.drain.rotate() == i
            assert ring.consumer == ring.producer
            assert len(ring.rows(i, "faults")) == ROWS["faults"]
            assert len(ring.rows(i, "calls")) == ROWS["calls"]
            assert ring.rows(i, "text") == b"name\0\0\0\0"
            assert ring.rows(i, "stacks") == struct.pack("<4Q", i, 2, i, 7)
        assert (ring.stats.faults, ring.stats.damaged, ring.stats.error) == (300, 0, 0)


def test_a_record_in_the_making_stops_the_pass(tmp_path: Path) -> None:
    with Ring(tmp_path) as ring:
        ring.put(record(FAULT))
        ring.put(record(FAULT), DISCARD)
        ring.put(record(SWITCH), BUSY)
        before = ring.producer - 8 - len(record(SWITCH))
        ring.put(record(SWITCH))
        ring.drain.rotate()
        assert ring.consumer == before
        assert (len(ring.rows(0, "faults")), ring.rows(0, "switches")) == (ROWS["faults"], b"")


def test_damaged_records_are_counted(tmp_path: Path) -> None:
    """Too short for what their heads say, of no kind, longer than what was written: none is read beyond."""
    long = HEAD.pack(FAULT, 0, 255, 255, -1, 0, 1, 1, 1, 0, 5, 0, 0) + bytes(8)
    with Ring(tmp_path) as ring:
        for data in (b"", b"\x01", long[:20], long, record(SYSCALL)[:60], record(77), record(0)[:40]):
            ring.put(data)
        ring.put(record(FAULT))
        ring.drain.rotate()
        assert (ring.stats.damaged, ring.stats.faults) == (7, 1)
        ring.put(record(FAULT), length=3 * PAGE)
        ring.put(record(FAULT))
        ring.drain.rotate()
        assert (ring.stats.damaged, ring.consumer) == (8, ring.producer)


def test_random_records(tmp_path: Path) -> None:
    """Heads of random bytes: each is taken or damaged, and the next pass goes on. A batch is several, or none."""
    chance = random.Random(5)
    more = 0
    with Ring(tmp_path, 64 * PAGE) as ring:
        for _ in range(40):
            for _ in range(100):
                data = bytearray(chance.randbytes(chance.choice((8, 56, 120, 300, 1500))))
                data[0] = chance.randrange(1, 12)
                if data[0] == BATCH and data[2] <= 32 and len(data) >= 48 + 16 * data[2]:
                    more += data[2] - 1
                ring.put(bytes(data))
            ring.drain.rotate()
            assert ring.consumer == ring.producer
        assert ring.stats.damaged + sum(ring.stats.taken) == 4000 + more
        assert min(ring.stats.damaged, sum(ring.stats.taken)) > 100


def test_batches_become_faults(tmp_path: Path) -> None:
    """Of 32 faults, of 1 and of none; more than fit, or than the record has room for, are damaged."""

    def batch(n: int, rows: int) -> bytes:
        head = HEAD.pack(BATCH, 0, n, 0, 9, 3, 70, 71, 2, 0, 10**15, 0, 0)
        times = [i * 0x1FFFFFF for i in range(rows)]  # the last takes all 30 bits
        words = [
            (
                0x7FFF_FFFF_F000 + i | (t & 0xFFFF) << 48,
                0x5555_0000_0000 + i | (t >> 16) << 48 | (i & 3) << 62,
            )
            for i, t in enumerate(times)
        ]
        return head + b"".join(struct.pack("<QQ", *w) for w in words)

    with Ring(tmp_path, 4 * PAGE) as ring:
        for n, rows in ((32, 32), (1, 1), (0, 0), (33, 33), (2, 1)):
            ring.put(batch(n, rows))
        ring.drain.rotate()
        assert (ring.stats.faults, ring.stats.taken[FAULT], ring.stats.damaged) == (33, 33, 2)
        raw = ring.rows(0, "faults")
        rows = [HEAD.unpack(raw[i : i + 48]) for i in range(0, len(raw), ROWS["faults"])]
        assert {(r[0], *r[2:10], r[11]) for r in rows} == {(FAULT, 0, 0, 9, 3, 70, 71, 2, 0, 0)}
        assert [r[1] for r in rows] == [i & 3 for i in range(32)] + [0]
        assert [r[10] for r in rows] == [10**15 + i * 0x1FFFFFF for i in range(32)] + [10**15]
        assert [r[12] for r in rows] == [0x5555_0000_0000 + i for i in range(32)] + [0x5555_0000_0000]
        columns = np.frombuffer(raw, "<i8").reshape(-1, 8)
        assert columns[:, 6].tolist() == [0x7FFF_FFFF_F000 + i for i in range(32)] + [0x7FFF_FFFF_F000]
        assert set(columns[:, 7].tolist()) == {-1}


def test_raw_stacks(tmp_path: Path) -> None:
    """Registers and stack: none, a full copy, and counts that cannot be."""
    sizes = (17, 17 + 1, 17 + 128, 17 + 129, 16, 255)
    with Ring(tmp_path, 16 * PAGE) as ring:
        for n in sizes:
            ring.put(record(FAULT, flags=RAW, frames=tuple(range(n))))
        ring.drain.rotate()
        rows = np.frombuffer(ring.rows(0, "raw"), np.uint8).reshape(-1, ROWS["raw"])
        assert rows[:, 16:20].view("<u4").ravel().tolist() == [0, 8, 1024]
        faults = np.frombuffer(ring.rows(0, "faults"), "<i8").reshape(-1, 8)
        assert faults[:, 7].tolist() == [0, 1, 2, -1, -1, -1]


def test_stacks_are_numbered_until_forgotten(tmp_path: Path) -> None:
    """More distinct stacks than the table keeps (64 MiB): numbers go on, none is given twice."""
    frames, batch, batches = 61, 4096, 34
    one = 8 + 56 + frames * 8
    block = np.zeros((batch, one // 8), "<u8")
    block[:, 0] = one - 8
    block[:, 1] = np.frombuffer(record(FAULT)[:8], "<u8")[0] | np.uint64(frames << 16)
    with Ring(tmp_path, 4096 * PAGE) as ring:
        for i in range(batches):
            block[:, 8:] = np.arange(batch, dtype="<u8")[:, None] + np.uint64(i * batch)
            raw = block.tobytes()
            spot = ring.producer % ring.size
            for at in (spot, spot + ring.size, spot - ring.size):
                low, high = max(at, 0), min(at + len(raw), 2 * ring.size)
                if low < high:
                    os.pwrite(ring.fd, raw[low - at : high - at], 2 * PAGE + low)
            ring.producer += len(raw)
            os.pwrite(ring.fd, struct.pack("<Q", ring.producer), PAGE)
            ring.drain.rotate()
            ids = np.frombuffer(ring.rows(i, "faults"), "<i8").reshape(-1, 8)[:, 7]
            assert ids.tolist() == list(range(i * batch, (i + 1) * batch))
            for path in tmp_path.glob(f"{i:08d}.*"):
                path.unlink()
        assert ring.stats.damaged == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="missing capability: /dev/full")
def test_a_full_disk_drops_and_counts(tmp_path: Path) -> None:
    for which in ("faults", "calls", "switches", "stacks", "text", "raw"):
        (tmp_path / f"{1:08d}.{which}").symlink_to("/dev/full")
    with Ring(tmp_path, 16 * PAGE) as ring:
        ring.put(record(FAULT))
        ring.drain.rotate()
        ring.put(record(FAULT))
        ring.drain.rotate()
        assert ring.stats.error == 28  # ENOSPC
        for _ in range(3):
            ring.put(record(FAULT))
        ring.put(record(SYSCALL))
        ring.drain.rotate()
        assert (ring.stats.dropped_faults, ring.stats.dropped_others) == (3, 1)


def test_with_its_thread(tmp_path: Path) -> None:
    with Ring(tmp_path, 16 * PAGE) as ring:
        ring.drain.start()
        for _ in range(50):
            ring.put(record(FAULT, frames=(1, 2, 3)))
        assert ring.drain.stop() == 0
        assert ring.stats.faults == 50 and ring.consumer == ring.producer


def test_a_drain_that_cannot_be_opened_leaves_nothing(tmp_path: Path) -> None:
    """No directory to write to, or a ring that cannot be mapped: no descriptor and no mapping is left."""

    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(
            Path("/proc/self/maps").read_text().splitlines()
        )

    small = os.memfd_create("ring")  # mapping it whole works: nobody touches what is behind its end
    nowhere = tmp_path / "none"
    pipe = os.pipe()

    def refused() -> None:
        for fds, directory in (([small], nowhere), ([small, pipe[0]], tmp_path)):
            with pytest.raises(OSError, match=r".*"):
                Drain(fds, PAGE, directory)

    refused()  # imports and the like
    before = held()
    for _ in range(20):
        refused()
    after = held()
    for fd in (small, *pipe):
        os.close(fd)
    assert after[0] == before[0]
    assert after[1] <= before[1] + 3  # malloc may map another arena piece
