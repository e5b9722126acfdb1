"""Memory and state of unusual sorts, saved and brought back, or refused with the reason."""

from __future__ import annotations

import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from live.test_checkpoint_rollback import assert_same, settle
from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.fast import Checkpoint
from pagelens.checkpoint.incremental import Chain
from pagelens.checkpoint.look import diff, open_side
from pagelens.checkpoint.rollback import rollback
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.verify import verify
from pagelens.linux.memory import read_memory
from pagelens.vm.errors import CapabilityMissingError, UsageError
from support import raw
from support.puppet import MAP_ANON, MAP_HUGETLB, MAP_PRIVATE, MAP_SHARED, NR, PAGE, RW, Puppet
from support.scribe import process_state
from support.subjects import Subjects

HUGE = 512


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as puppet:
        puppet.tell("malloc", 100)
        yield puppet


@pytest.mark.parametrize(("width", "capability"), [(16, "SSE2"), (32, "AVX2"), (64, "AVX-512BW")])
def test_vector_registers_go_back_with_the_memory(
    subjects: Subjects, tmp_path: Path, width: int, capability: str
) -> None:
    # The program ends itself when one of them (xmm, ymm or zmm; opmask, mxcsr, x87) does not fit its memory.
    command = [subjects("wide"), str(width)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None

    def rounds() -> int:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        line = child.stdout.readline()
        assert line, f"the program ended: {child.wait()}"
        return int(line)

    try:
        first = child.stdout.readline()
        if not first and child.wait() == 3:
            pytest.skip(f"missing capability: {capability} (this CPU)")
        pid = int(first)
        while rounds() < 1:  # its threads have all begun
            time.sleep(0.01)
        for number in range(4):
            dump(pid, tmp_path / f"c{number}")
            saved = Stored.open(tmp_path / f"c{number}")
            for _ in range(3):
                before = rounds()
                deadline = time.monotonic() + 30
                while rounds() < before + 3:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                settle_reader(pid)
                rollback(pid, saved)
                assert child.poll() is None
        assert rounds() > 0
    finally:
        child.kill()
        child.communicate()


def settle_reader(pid: int) -> None:
    # The main thread waits for a line again; the other one never sleeps.
    deadline = time.monotonic() + 20
    while not Path(f"/proc/{pid}/task/{pid}/syscall").read_text().startswith("0 0x0 "):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("sharing", [MAP_PRIVATE, MAP_SHARED])
def test_hugetlb(puppet: Puppet, tmp_path: Path, sharing: int) -> None:
    arguments = (0, 2 * HUGE * PAGE, RW, sharing | MAP_ANON | MAP_HUGETLB, 2**64 - 1, 0)
    area, _ = puppet.tell("sys", NR["mmap"], *arguments)
    if area < 0:
        pytest.skip("missing capability: free huge pages (vm.nr_hugepages)")
    puppet.write(area, HUGE, value=3)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    assert saved.read(area, HUGE * PAGE)[::PAGE] == b"\3" * HUGE
    assert verify(tmp_path / "c").ok
    puppet.write(area + 7 * PAGE, 2, value=9)
    settle(puppet.pid)
    assert not diff(saved, open_side(puppet.pid)).same
    rollback(puppet.pid, saved)
    assert_same(puppet.pid, saved)
    assert puppet.read(area, HUGE) == 3 * HUGE
    puppet.sys("munmap", area, 2 * HUGE * PAGE)
    settle(puppet.pid)
    with pytest.raises(UsageError, match="hugetlb"):
        rollback(puppet.pid, saved)
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0


@pytest.mark.requires("uffd-wp-async")
def test_hugetlb_watched(puppet: Puppet, tmp_path: Path) -> None:
    arguments = (0, 2 * HUGE * PAGE, RW, MAP_PRIVATE | MAP_ANON | MAP_HUGETLB, 2**64 - 1, 0)
    area, _ = puppet.tell("sys", NR["mmap"], *arguments)
    if area < 0:
        pytest.skip("missing capability: free huge pages (vm.nr_hugepages)")
    puppet.write(area, HUGE, value=3)
    settle(puppet.pid)
    with Chain(puppet.pid, tmp_path / "chain") as chain:
        for value in (3, 4, 5):
            puppet.write(area + 5 * PAGE, 1, value=value)
            settle(puppet.pid)
            done = chain.take()
            assert Stored.open(done.path).read(area + 5 * PAGE, 1) == bytes([value])
            assert diff(Stored.open(done.path), open_side(puppet.pid)).same
    with Checkpoint.take(puppet.pid) as point:
        for _ in range(3):
            puppet.write(area + 3 * PAGE, 4, value=8)
            settle(puppet.pid)
            point.rollback()
            settle(puppet.pid)
            assert read_memory(puppet.pid, area, HUGE * PAGE)[::PAGE] == b"\3" * 5 + b"\5" + b"\3" * (
                HUGE - 6
            )


def test_a_process_that_shares_its_address_space_with_another_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "s.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <sched.h>\n#include <signal.h>\n#include <stdio.h>\n#include <unistd.h>\n"
        "#include <sys/prctl.h>\nstatic char stack[65536]; static volatile long n;\n"
        "static int other(void *p){ prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) n++; return 0; }\n"
        "int main(void){ int c = clone(other, stack + 65536, CLONE_VM | SIGCHLD, 0);\n"
        'printf("%d\\n", c); fflush(stdout); for (;;) pause(); }\n'
    )
    subprocess.run(["gcc", "-o", tmp_path / "s", source], check=True)
    child = subprocess.Popen([tmp_path / "s"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        other = int(child.stdout.readline())
        for pid in (child.pid, other):
            with pytest.raises(UsageError, match="shares the address space"):
                dump(pid, tmp_path / "c")
            assert not (tmp_path / "c").exists()
            assert process_state(pid)[1] == 0
    finally:
        child.kill()
        child.communicate()


def test_swapped_pages(puppet: Puppet, swap: Path, tmp_path: Path) -> None:
    del swap
    area = puppet.island(64)
    puppet.write(area, 64, value=6)
    puppet.page_out(area, 32)
    out = raw.bits(puppet.pid, area, 64, raw.SWAPPED)
    assert out > 16
    settle(puppet.pid)
    done = dump(puppet.pid, tmp_path / "c")
    assert any("pages were in swap" in note for note in done.notes)
    saved = Stored.open(tmp_path / "c")
    assert saved.read(area, 64 * PAGE)[::PAGE] == b"\6" * 64
    puppet.write(area, 64, value=7)
    puppet.page_out(area + 16 * PAGE, 32)
    settle(puppet.pid)
    rollback(puppet.pid, saved)
    assert puppet.read(area, 64) == 6 * 64


def test_a_process_that_handles_its_own_page_faults(puppet: Puppet, tmp_path: Path) -> None:
    # Its handler stands still with it, so nothing may fault in there: saved as it is, a rollback refused.
    area, other = puppet.island(8), puppet.island(2)
    puppet.write(area, 3, value=4)
    puppet.write(other, 2, value=1)
    fd, _ = puppet.tell("sys", NR["userfaultfd"], 1)  # UFFD_USER_MODE_ONLY
    assert fd >= 0
    at = puppet.line + 2048
    for request, text in (
        (0xC018AA3F, struct.pack("<QQQ", 0xAA, 0, 0)),  # UFFDIO_API
        (0xC020AA00, struct.pack("<QQQQ", area, 8 * PAGE, 1, 0)),  # UFFDIO_REGISTER, missing
    ):
        with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
            mem.seek(at)
            mem.write(text)
        assert puppet.tell("sys", 16, fd, request, at)[0] == 0
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    assert saved.read(area, 8 * PAGE)[::PAGE] == b"\4" * 3 + bytes(5)
    with Chain(puppet.pid, tmp_path / "chain") as chain:  # what its own userfaultfd has is read each time
        for number in range(5, 8):
            puppet.write(area + PAGE, 1, value=number)
            puppet.write(other, 1, value=number)
            settle(puppet.pid)
            link = Stored.open(chain.take().path)
            assert link.read(area, 8 * PAGE)[::PAGE] == bytes((4, number, 4)) + bytes(5)
            assert link.read(other, 2 * PAGE)[::PAGE] == bytes((number, 1))
        assert verify(chain.made[-1]).ok
    puppet.write(other, 2, value=2)
    settle(puppet.pid)
    with pytest.raises(UsageError, match="handles page faults itself"):
        rollback(puppet.pid, saved)
    assert read_memory(puppet.pid, other, 2 * PAGE)[::PAGE] == b"\2\2"
    with pytest.raises((CapabilityMissingError, UsageError)), Checkpoint.take(puppet.pid):
        pass
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0
