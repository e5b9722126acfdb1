"""Rollback: memory map, contents and registers are as they were; what cannot be brought back is refused."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pagelens.checkpoint.dump import dump
from pagelens.checkpoint.fast import Checkpoint
from pagelens.checkpoint.look import diff, open_side
from pagelens.checkpoint.rollback import rollback
from pagelens.checkpoint.stored import Stored
from pagelens.checkpoint.verify import verify
from pagelens.linux.hold import Held
from pagelens.linux.memory import read_memory
from pagelens.vm.errors import DamagedInputError, TargetGoneError, UsageError
from support.puppet import MADV, MAP_ANON, MAP_PRIVATE, MAP_SHARED, PAGE, PROT_NONE, PROT_READ, RW, Puppet
from support.scribe import Scribe, process_state
from support.subjects import Subjects


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as puppet:
        yield puppet


def settle(pid: int) -> None:
    # Back in read(0), where it was when it was saved.
    deadline = time.monotonic() + 5
    while process_state(pid)[0] != "S":
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def assert_same(pid: int, saved: Stored) -> None:
    settle(pid)
    found = diff(saved, open_side(pid))
    assert found.same, found
    settle(pid)
    assert process_state(pid)[1] == 0


def test_every_change_of_the_map_is_undone(puppet: Puppet, tmp_path: Path) -> None:
    pages = {
        name: puppet.island(8) for name in ("write", "hole", "ro", "gone", "moved", "none", "lock", "thp")
    }
    for number, addr in enumerate(pages.values()):
        puppet.write(addr, 4, value=number + 1)
    brk = puppet.sys("brk", 0)
    puppet.sys("brk", brk + 64 * PAGE)
    puppet.write(brk, 64, value=9)
    big = puppet.tell("malloc", 300_000)[0]
    puppet.write(big, 70, value=8)
    memfd = puppet.sys("memfd_create", puppet.line, 0)
    puppet.sys("ftruncate", memfd, 8 * PAGE)
    shared = puppet.mmap(8, RW, MAP_SHARED, fd=memfd)
    puppet.write(shared, 4, value=5)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    assert_same(puppet.pid, saved)

    puppet.write(pages["write"], 8, value=77)
    puppet.sys("munmap", pages["hole"] + 2 * PAGE, 2 * PAGE)
    puppet.sys("mprotect", pages["ro"], 4 * PAGE, PROT_READ)
    puppet.sys("munmap", pages["gone"], 8 * PAGE)
    target = puppet.island(16)
    puppet.sys("mremap", pages["moved"], 8 * PAGE, 8 * PAGE, 3, target)
    puppet.sys("mprotect", pages["none"], 8 * PAGE, PROT_NONE)
    puppet.sys("mlock", pages["lock"], 8 * PAGE)
    puppet.sys("madvise", pages["thp"], 4 * PAGE, MADV["DONTNEED"])
    puppet.sys("madvise", pages["write"], 8 * PAGE, MADV["HUGEPAGE"])
    puppet.sys("brk", brk + 128 * PAGE)
    puppet.write(brk, 128, value=10)
    puppet.mmap(100)
    puppet.mmap(3, RW, MAP_SHARED | MAP_ANON)
    puppet.write(shared, 8, value=66)
    puppet.sys("munmap", shared, 8 * PAGE)
    puppet.tell("free", big)
    assert not diff(saved, open_side(puppet.pid)).same
    done = rollback(puppet.pid, saved)
    assert done.vma_calls > 10
    assert done.written_pages > 70
    assert_same(puppet.pid, saved)

    puppet.sys("brk", brk)  # the heap shrinks below what it was
    rollback(puppet.pid, saved)
    assert_same(puppet.pid, saved)
    again = rollback(puppet.pid, saved)
    assert (again.vma_calls, again.dropped_pages) == (0, 0)
    assert puppet.tell("read", pages["moved"], 4 * PAGE, PAGE)[0] == 4 * 5  # and it works on


def test_guard_pages_are_undone(puppet: Puppet, tmp_path: Path) -> None:
    area = puppet.island(8)
    puppet.write(area, 8)
    probe, _ = puppet.tell("sys", 28, area + PAGE, PAGE, MADV["GUARD_INSTALL"])
    if probe:
        pytest.skip("missing capability: MADV_GUARD_INSTALL (Linux 6.13)")
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    puppet.sys("madvise", area + PAGE, PAGE, MADV["GUARD_REMOVE"])
    puppet.write(area + PAGE)
    puppet.sys("madvise", area + 4 * PAGE, 2 * PAGE, MADV["GUARD_INSTALL"])
    rollback(puppet.pid, Stored.open(tmp_path / "c"))
    assert_same(puppet.pid, Stored.open(tmp_path / "c"))


def test_what_memory_cannot_bring_back_is_refused_untouched(puppet: Puppet, tmp_path: Path) -> None:
    area = puppet.island(4)
    puppet.write(area, 4, value=1)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    puppet.write(area, 4, value=2)
    fd = puppet.sys("memfd_create", puppet.line, 0)
    with pytest.raises(UsageError, match=rf"descriptor {fd} was opened .*\[files\]; --accept files"):
        rollback(puppet.pid, saved)
    assert puppet.tell("read", area, 4 * PAGE, PAGE)[0] == 8  # untouched
    puppet.tell("sys", 3, fd)
    tid, _ = puppet.tell("thread")
    with pytest.raises(UsageError, match=rf"threads began: {tid} \[threads\]"):
        rollback(puppet.pid, saved)
    with pytest.raises(UsageError, match="no such kind: nonsense"):
        rollback(puppet.pid, saved, accept=("nonsense",))
    other = subprocess.Popen(["sleep", "100"])
    try:
        with pytest.raises(UsageError, match=f"of process {puppet.pid}"):
            rollback(other.pid, saved)
    finally:
        other.kill()
        other.wait()
    assert process_state(puppet.pid)[1] == 0


def test_offsets_and_children(tmp_path: Path) -> None:
    program = (
        "import sys, os\nf = open(sys.argv[1], 'rb', 0)\nprint('r', flush=True)\n"
        "for line in sys.stdin:\n exec(line)\n print('.', flush=True)\n"
    )
    (tmp_path / "data").write_bytes(b"0123456789")
    child = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "data"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def tell(line: str) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(line.encode() + b"\n")
        child.stdin.flush()
        assert child.stdout.readline()

    assert child.stdout is not None
    child.stdout.readline()
    settle(child.pid)
    try:
        dump(child.pid, tmp_path / "c")
        saved = Stored.open(tmp_path / "c")
        tell("f.read(3)")
        settle(child.pid)
        with pytest.raises(UsageError, match=r"offset of descriptor 3 .* 0 -> 3 \[offsets\]"):
            rollback(child.pid, saved)
        done = rollback(child.pid, saved, accept=("offsets",))
        assert len(done.accepted) == 1
        tell("f.seek(0)")
        tell("p = os.posix_spawn('/bin/true', ['true'], {})")
        settle(child.pid)
        with pytest.raises(UsageError, match=r"children began"):
            rollback(child.pid, saved)
        tell("os.waitpid(p, 0)")
        settle(child.pid)
        rollback(child.pid, saved)
        tell("import signal; signal.signal(signal.SIGUSR2, signal.SIG_IGN)")
        settle(child.pid)
        with pytest.raises(UsageError, match=r"whether signals 12 are ignored changed \[signals\]"):
            rollback(child.pid, saved)
    finally:
        child.kill()
        child.communicate()


def test_threads_go_on_from_where_they_were(subjects: Subjects, tmp_path: Path) -> None:
    with Scribe(subjects("scribe"), 3, 16, tmp_path / "file") as scribe:
        dump(scribe.pid, tmp_path / "c")
        saved = Stored.open(tmp_path / "c")
        then = scribe.check(saved.read)
        for _ in range(5):
            time.sleep(0.05)
            rollback(scribe.pid, saved)
            with Held(scribe.pid):
                # At most what was done since; a rollback that missed a page breaks the invariant.
                now = scribe.check(lambda addr, length: read_memory(scribe.pid, addr, length))
            assert now >= then
        assert process_state(scribe.pid)[1] == 0


def test_a_python_interpreter_goes_on(tmp_path: Path) -> None:
    program = "import sys\nd = {}\nfor line in sys.stdin:\n    print(eval(line), flush=True)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(text: str) -> str:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(text + "\n")
        child.stdin.flush()
        return child.stdout.readline().strip()

    try:
        assert ask("d.update((i, str(i)) for i in range(20000)) or len(d)") == "20000"
        settle(child.pid)
        dump(child.pid, tmp_path / "c")
        saved = Stored.open(tmp_path / "c")
        for round_ in range(3):
            assert ask(f"d.clear() or d.update(x=[{round_}] * 100000) or len(d)") == "1"
            settle(child.pid)
            rollback(child.pid, saved)
            assert ask("(len(d), d[19999], 'x' in d)") == "(20000, '19999', False)"
            assert ask("sum(map(int, d.values()))") == str(sum(range(20000)))
    finally:
        child.kill()
        child.communicate()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="missing capability: redis-server")
def test_redis_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--enable-debug-command", "yes"],
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    client = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 10
    while True:
        try:
            client.connect(str(path))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ask(*words: str) -> str:
        client.sendall(
            b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in words)])
        )
        return client.recv(65536).decode().strip()

    try:
        assert ask("debug", "populate", "20000") == "+OK"
        assert ask("set", "key", "before") == "+OK"
        dump(server.pid, tmp_path / "c")
        saved = Stored.open(tmp_path / "c")
        for round_ in range(3):
            assert ask("set", "key", f"after {round_}") == "+OK"
            assert ask("debug", "populate", str(30000 + round_ * 1000), "more") == "+OK"
            # The descriptors are the same: this connection was there.
            rollback(server.pid, saved)
            assert ask("get", "key") == "$6\r\nbefore"
            assert ask("dbsize") == ":20001"
            assert ask("get", "key:19999") == "$11\r\nvalue:19999"
        assert ask("ping") == "+PONG"
    finally:
        client.close()
        server.kill()
        server.wait()


def test_a_sleep_is_not_cut_short_with_eintr(tmp_path: Path) -> None:
    source = tmp_path / "s.c"
    source.write_text(
        "#include <time.h>\n#include <stdio.h>\n#include <errno.h>\n"
        "int main(void){struct timespec t={1000,0}; int r=clock_nanosleep(CLOCK_MONOTONIC,0,&t,0);"
        'printf("%d\\n", r); return 0;}\n'
    )
    subprocess.run(["gcc", "-o", tmp_path / "s", source], check=True)
    child = subprocess.Popen([tmp_path / "s"])
    call = Path(f"/proc/{child.pid}/syscall")
    try:
        deadline = time.monotonic() + 20
        while not call.read_text().startswith("230 "):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        dump(child.pid, tmp_path / "c")
        for _ in range(2):
            rollback(child.pid, Stored.open(tmp_path / "c"))
        time.sleep(0.2)
        settle(child.pid)
        assert child.poll() is None
        assert call.read_text().startswith("230 ")  # still asleep: it would have printed 4 and exited
    finally:
        child.kill()
        child.wait()


def test_a_damaged_checkpoint_is_refused_before_anything_is_touched(puppet: Puppet, tmp_path: Path) -> None:
    area = puppet.mmap(4)
    puppet.tell("malloc", 100)
    puppet.write(area, 4, value=1)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    puppet.write(area, 4, value=2)
    settle(puppet.pid)
    pack = bytearray((tmp_path / "c" / "pages.pack").read_bytes())
    pack[len(pack) // 2] ^= 4
    (tmp_path / "c" / "pages.pack").write_bytes(pack)
    before = open_side(puppet.pid)
    with pytest.raises(DamagedInputError, match="block"):
        rollback(puppet.pid, Stored.open(tmp_path / "c"))
    assert diff(before, open_side(puppet.pid)).same


def altstack(puppet: Puppet, *change: int) -> tuple[int, int, int]:
    """(sp, flags, size) of the leader's alternate signal stack, after a change of it."""
    at = puppet.line + 2048
    if change:
        with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
            mem.seek(at)
            mem.write(struct.pack("<QI4xQ", *change))
        puppet.sys("sigaltstack", at, 0)
    puppet.sys("sigaltstack", 0, at)
    sp, flags, size = struct.unpack("<QI4xQ", read_memory(puppet.pid, at, 24))
    return sp, flags, size


@pytest.mark.requires("bpf")
def test_alternate_signal_stacks_are_saved_and_come_back(puppet: Puppet, tmp_path: Path) -> None:
    area = puppet.mmap(16)
    assert altstack(puppet) == (0, 2, 0)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "none")
    mine = altstack(puppet, area, 0, 8 * PAGE)
    assert mine == (area, 0, 8 * PAGE)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    none, saved = Stored.open(tmp_path / "none"), Stored.open(tmp_path / "c")
    assert [s.threads[0].altstack for s in (none, saved)] == [(0, 2, 0), mine]
    assert "altstack" in diff(none, saved).registers[puppet.pid]
    for other in ((area + PAGE, 1 << 31, 4 * PAGE), (0, 2, 0)):  # 1 << 31: SS_AUTODISARM
        assert altstack(puppet, *other) == other
        rollback(puppet.pid, saved)
        assert_same(puppet.pid, saved)
        assert altstack(puppet) == mine
    rollback(puppet.pid, none)
    assert altstack(puppet) == (0, 2, 0)


def test_a_process_confined_by_seccomp_is_not_asked_for_calls(puppet: Puppet, tmp_path: Path) -> None:
    area = puppet.mmap(4)
    puppet.write(area, 4, value=1)
    puppet.sys("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    at = puppet.line + 2048
    with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
        mem.seek(at)
        # struct sock_fprog with one instruction: allow everything.
        mem.write(struct.pack("<H6xQHBBI", 1, at + 16, 6, 0, 0, 0x7FFF0000))
    assert puppet.sys("seccomp", 1, 0, at) == 0
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    puppet.write(area, 4, value=2)
    settle(puppet.pid)
    rollback(puppet.pid, saved)  # contents alone need no call
    assert puppet.tell("read", area, 4 * PAGE, PAGE)[0] == 4
    new = puppet.mmap(3)
    with pytest.raises(UsageError, match="seccomp"):
        rollback(puppet.pid, saved)
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0
    puppet.sys("munmap", new, 3 * PAGE)


@pytest.mark.requires("uffd-wp-async")
def test_fast_rollbacks_undo_whatever_was_done(puppet: Puppet, tmp_path: Path) -> None:
    area, other, third = puppet.island(64), puppet.island(16), puppet.island(4)
    puppet.write(third, 4)
    puppet.tell("malloc", 100)  # the heap is there from now on
    puppet.write(area, 32, value=3)
    puppet.tell("read", other, 8 * PAGE, PAGE)  # zero pages
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    rng = random.Random(5)
    slow = 0
    with Checkpoint.take(puppet.pid) as point:
        point.save(tmp_path / "memory")
        assert verify(tmp_path / "memory").ok
        # Below the stack pointer lies what is left of the call that made the userfaultfd.
        assert [r.name for r in diff(saved, Stored.open(tmp_path / "memory")).regions] in ([], ["[stack]"])
        dump(puppet.pid, tmp_path / "d")
        saved = Stored.open(tmp_path / "d")
        assert diff(saved, Stored.open(tmp_path / "memory")).same
        for round_ in range(150):
            for _ in range(rng.randrange(1, 6)):
                where = rng.choice((area, other)) + rng.randrange(12) * PAGE
                match rng.randrange(6):
                    case 0 | 1:
                        puppet.write(where, rng.randrange(1, 4), value=rng.randrange(256))
                    case 2:
                        puppet.sys("madvise", where, 2 * PAGE, MADV["DONTNEED"])
                    case 3:
                        puppet.tell("read", where, 3 * PAGE, PAGE)
                    case 4 if round_ % 5 == 0:
                        puppet.mmap(rng.randrange(1, 9))
                    case 5 if round_ % 7 == 0:
                        puppet.sys("mprotect", third + PAGE, PAGE, PROT_READ)
                    case _:
                        puppet.tell("malloc", 100)
            done = point.rollback()
            slow += not done.fast
            settle(puppet.pid)
            assert (rng.random() < 0.8) or diff(saved, open_side(puppet.pid)).same
        assert_same(puppet.pid, saved)
        assert 5 < slow < 75
        assert point.rollbacks == 150
        fd = puppet.sys("memfd_create", puppet.line, 0)
        with pytest.raises(UsageError, match=f"descriptor {fd} was opened"):
            point.rollback()
        point.rollback(accept=("files",))
        puppet.tell("thread")
        with pytest.raises(UsageError, match="threads began"):
            point.rollback(accept=("files",))
    settle(puppet.pid)
    assert process_state(puppet.pid)[1] == 0


@pytest.mark.requires("uffd-wp-async")
def test_fast_rollbacks_of_many_scattered_pages(puppet: Puppet) -> None:
    # More regions than one answer of PAGEMAP_SCAN takes at a time (512), up to the end of the mapping.
    pages = 4096
    area = puppet.mmap(pages)
    puppet.write(area, pages - 100, value=5)
    puppet.tell("malloc", 100)
    settle(puppet.pid)
    with Checkpoint.take(puppet.pid, watch=False) as point:
        for stride, dropped in ((2, 0), (3, 1500), (1, 0), (2, 900)):
            puppet.tell("write", area, pages * PAGE, stride * PAGE, 77)
            if dropped:
                puppet.sys("madvise", area + 700 * PAGE, dropped * PAGE, MADV["DONTNEED"])
            settle(puppet.pid)
            done = point.rollback()
            assert done.fast
            expected = pages // stride if stride < 3 else -(-pages // 3) + dropped * 2 // 3
            assert abs(done.written_pages - expected - (dropped // 2 if stride == 2 else 0)) < 20
            settle(puppet.pid)
            raw = read_memory(puppet.pid, area, pages * PAGE)
            assert raw[::PAGE] == b"\x05" * (pages - 100) + bytes(100)


@pytest.mark.requires("uffd-wp-async")
def test_fast_rollbacks_of_a_private_file_mapping_whose_copies_were_dropped(
    puppet: Puppet, tmp_path: Path
) -> None:
    # Asynchronous write protection outlives the page there (a marker), so neither the drop nor the file's page that
    # a read brings in looks written.
    (tmp_path / "file").write_bytes(b"\x05" * (8 * PAGE))
    with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
        mem.seek(puppet.line + 2048)
        mem.write(os.fsencode(tmp_path / "file") + b"\0")
    area = puppet.mmap(8, RW, MAP_PRIVATE, fd=puppet.sys("open", puppet.line + 2048, 0, 0))
    puppet.write(area, 4, value=9)
    puppet.tell("malloc", 100)
    settle(puppet.pid)
    with Checkpoint.take(puppet.pid) as point:
        before = puppet.tell("read", area, 8 * PAGE, PAGE)[0]
        assert before == 4 * 9 + 4 * 5
        for dropped, read in ((0, False), (0, True), (2, True), (3, False)):
            point.rollback()
            puppet.sys("madvise", area + dropped * PAGE, 5 * PAGE, MADV["DONTNEED"])
            if read:
                puppet.tell("read", area, 8 * PAGE, PAGE)
            settle(puppet.pid)
            done = point.rollback()
            assert done.fast
            settle(puppet.pid)
            assert read_memory(puppet.pid, area, 8 * PAGE)[::PAGE] == b"\x09" * 4 + b"\x05" * 4


@pytest.mark.requires("uffd-wp-async")
def test_guard_pages_do_not_make_fast_rollbacks_slow(puppet: Puppet) -> None:
    area = puppet.island(8)
    puppet.write(area, 8)
    puppet.tell("malloc", 100)
    if puppet.tell("sys", 28, area + PAGE, PAGE, MADV["GUARD_INSTALL"])[0]:
        pytest.skip("missing capability: MADV_GUARD_INSTALL (Linux 6.13)")
    settle(puppet.pid)
    with Checkpoint.take(puppet.pid) as point:
        for _ in range(3):
            puppet.write(area, 1, value=9)
            settle(puppet.pid)
            assert point.rollback().fast
        puppet.sys("madvise", area + PAGE, PAGE, MADV["GUARD_REMOVE"])
        settle(puppet.pid)
        assert not point.rollback().fast  # only the process itself can put it back
        settle(puppet.pid)
        puppet.write(area, 1, value=9)
        settle(puppet.pid)
        assert point.rollback().fast


@pytest.mark.requires("uffd-wp-async")
def test_a_target_that_dies_and_a_checkpoint_that_is_closed_are_said(puppet: Puppet) -> None:
    area = puppet.mmap(1)
    puppet.write(area, 1, value=6)
    settle(puppet.pid)
    with Checkpoint.take(puppet.pid) as point:
        with ThreadPoolExecutor(3) as pool:  # any thread may call
            assert all(back.fast for back in pool.map(lambda _: point.rollback(), range(12)))
        os.kill(puppet.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while process_state(puppet.pid)[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for _ in range(2):
            with pytest.raises(TargetGoneError):
                point.rollback()
        assert point.read(area, 2) == b"\x06\x00"
    for call in (point.rollback, lambda: point.read(area, 1), lambda: point.save(Path("/nowhere"))):
        with pytest.raises(UsageError, match="closed"):
            call()


@pytest.mark.requires("uffd-wp-async")
def test_sigkill_of_a_process_that_holds_a_checkpoint_leaves_the_target_alone(puppet: Puppet) -> None:
    program = (
        "import sys, time\nfrom pagelens.checkpoint.fast import Checkpoint\n"
        f"p = Checkpoint.take({puppet.pid})\nprint('.', flush=True)\nwhile True: p.rollback()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    time.sleep(0.3)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert process_state(puppet.pid)[1] == 0
    area = puppet.mmap(4)
    puppet.write(area, 4, value=2)
    assert puppet.tell("read", area, 4 * PAGE, PAGE)[0] == 8


def test_map_private_file_pages_go_back_to_their_file(puppet: Puppet, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x05" * (8 * PAGE))
    puppet.tell("write", puppet.line + 2048, 1, 1, 0)
    # The path goes into the puppet's own buffer through its memory file.
    text = os.fsencode(path) + b"\0"
    with open(f"/proc/{puppet.pid}/mem", "r+b", buffering=0) as mem:
        mem.seek(puppet.line + 2048)
        mem.write(text)
    fd = puppet.sys("open", puppet.line + 2048, 0, 0)
    area = puppet.mmap(8, RW, MAP_PRIVATE, fd=fd)
    puppet.write(area, 2, value=9)
    puppet.tell("read", area + 3 * PAGE, PAGE, PAGE)
    settle(puppet.pid)
    dump(puppet.pid, tmp_path / "c")
    saved = Stored.open(tmp_path / "c")
    puppet.write(area, 8, value=11)
    rollback(puppet.pid, saved)
    assert puppet.tell("read", area, 8 * PAGE, PAGE)[0] == 2 * 9 + 6 * 5
    puppet.sys("munmap", area, 8 * PAGE)
    settle(puppet.pid)
    rollback(puppet.pid, saved)
    assert puppet.tell("read", area, 8 * PAGE, PAGE)[0] == 2 * 9 + 6 * 5
