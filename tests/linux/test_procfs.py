"""Opening processes: gone, reused, zombie, kernel thread, without privilege; malformed files of the
kernel."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagelens.linux import maps, smaps, snapshot
from pagelens.linux.procfs import Process, TaskStat
from pagelens.vm import DamagedInputError, Prot, TargetGoneError, UsageError
from support.puppet import Puppet
from support.subjects import Subjects


@pytest.fixture
def puppet(subjects: Subjects) -> Iterator[Puppet]:
    with Puppet(subjects("puppet")) as child:
        yield child


def test_stat_with_an_ugly_name() -> None:
    fields = " ".join(str(n) for n in range(5, 53))
    stat = TaskStat.parse(f"42 (a) b ((c) S 7 {fields}\n".encode())
    assert (stat.pid, stat.comm, stat.state, stat.ppid) == (42, "a) b ((c", "S", 7)
    # Fields as proc_pid_stat(5) numbers them: the text holds each field's own number from 5 on.
    assert (stat.flags, stat.min_flt, stat.maj_flt, stat.starttime, stat.start_stack) == (9, 10, 12, 22, 28)
    assert (stat.start_brk, stat.arg_start, stat.env_end) == (47, 48, 51)
    with pytest.raises(DamagedInputError):
        TaskStat.parse(b"42 (a) S 7")


def test_stat_agrees_with_the_kernel() -> None:
    with Process.open(os.getpid()) as proc:
        stat = proc.stat()
    assert stat.ppid == os.getppid()
    assert stat.start_stack <= int(
        next(x for x in Path("/proc/self/maps").read_text().splitlines() if "[stack]" in x)
        .split("-")[1]
        .split()[0],
        16,
    )


def test_no_such_process() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(TargetGoneError, match=f"no process {child.pid}"):
        Process.open(child.pid)
    with pytest.raises(UsageError):
        Process.open(0)


def test_gone_while_held(puppet: Puppet) -> None:
    """Reads through the handle fail as gone, whoever gets the number: never another process's answer."""
    proc = Process.open(puppet.pid)
    puppet.close()
    for read in (lambda: proc.read("maps"), proc.stat, proc.tasks, lambda: proc.fd("pagemap"), proc.pidfd):
        with pytest.raises(TargetGoneError, match="gone"):
            read()
    assert not proc.alive
    proc.close()


def test_a_reused_pid_is_refused(puppet: Puppet) -> None:
    with Process.open(puppet.pid) as proc:
        start = proc.starttime
    with Process.open(puppet.pid, starttime=start):
        pass
    with pytest.raises(TargetGoneError, match="another process has that pid"):
        Process.open(puppet.pid, starttime=start - 1)


def test_really_reused(subjects: Subjects) -> None:
    """A pid that the kernel gave away again (in a pid namespace of its own, where they come round
    quickly)."""
    if os.geteuid():
        pytest.skip("missing capability: root (a pid namespace)")
    script = """
import os, sys, time
from pagelens.linux.procfs import Process
from pagelens.vm import TargetGoneError
open('/proc/sys/kernel/ns_last_pid', 'w').write('299')
first = os.posix_spawn('/bin/sleep', ['sleep', '100'], {})
held = Process.open(first)
start = held.starttime
time.sleep(0.02)  # the start time counts in ticks of 10 ms
os.kill(first, 9); os.waitpid(first, 0)
open('/proc/sys/kernel/ns_last_pid', 'w').write(str(first - 1))
second = os.posix_spawn('/bin/sleep', ['sleep', '100'], {})
assert second == first, (first, second)
for attempt in (lambda: held.read('maps'), lambda: Process.open(first, starttime=start)):
    try:
        attempt()
        print('answered')
    except TargetGoneError as error:
        print(error)
os.kill(second, 9)
"""
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", os.sys.executable, "-c", script],  # type: ignore[attr-defined]
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "src"}, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "ns_last_pid" in done.stderr:
        pytest.skip(
            f"missing capability: pid namespace with ns_last_pid ({done.stderr.strip().splitlines()[-1]})"
        )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].endswith("is gone")
    assert "another process has that pid now" in lines[1]


def test_kernel_thread_and_zombie() -> None:
    with pytest.raises(UsageError, match="kernel thread"):
        Process.open(2)
    zombie = subprocess.Popen(["true"])
    while b") Z" not in Path(f"/proc/{zombie.pid}/stat").read_bytes():
        time.sleep(0.001)
    with pytest.raises(TargetGoneError, match="zombie"):
        Process.open(zombie.pid)
    zombie.wait()


def test_leader_gone_threads_alive(puppet: Puppet) -> None:
    """After pthread_exit of the main thread, the space is read through a thread that lives."""
    before = snapshot.take(puppet.pid, pages=False).vmas
    puppet.tell("thread")
    puppet.tell("exit_leader")
    while b") Z" not in Path(f"/proc/{puppet.pid}/stat").read_bytes():
        time.sleep(0.001)
    after = snapshot.take(puppet.pid).vmas
    assert {v.start for v in before} <= {v.start for v in after}


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish",
        b"7f00-6f00 rw-p 0 00:00 0",
        b"1000-2000 rwxq 0 00:00 0",
        b"1000-2000 rw-p zz 00:00 0",
        b"1000-2000 rw-p 0 00:00",
        b"\xff\xfe",
    ],
)
def test_malformed_maps(line: bytes) -> None:
    with pytest.raises(DamagedInputError, match="not a line of maps"):
        maps.parse(line)


def test_maps_lines() -> None:
    text = (
        b"00400000-00401000 r-xp 00001000 fe:01 12345                              /a b/c\\012d (deleted)\n"
        b"7fff00000000-7fff00021000 rw-p 00000000 00:00 0                          [stack]\n"
        b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
    )
    first, stack = maps.parse(text)
    assert (first.name, first.offset, first.dev, first.inode) == (
        "/a b/c\nd (deleted)",
        0x1000,
        "fe:01",
        12345,
    )
    assert first.prot == Prot.READ | Prot.EXEC
    assert stack.name == "[stack]"


SMAPS = b"""1000-2000 rw-p 00000000 00:00 0
Size:                  4 kB
Rss:                   4 kB
VmFlags: rd wr
3000-5000 r--p 00000000 00:00 0                          [heap]
Size:                  8 kB
Rss:                   0 kB
VmFlags: rd sd
"""


def test_smaps_columns() -> None:
    vmas, fields, rows = smaps.parse(SMAPS)
    assert fields == ("Size", "Rss")
    assert rows.tolist() == [[4096, 4096], [8192, 0]]
    assert [v.vm_flags for v in vmas] == [frozenset({"rd", "wr"}), frozenset({"rd", "sd"})]
    assert smaps.parse(b"")[2].shape == (0, 0)


@pytest.mark.parametrize(
    "text",
    [
        SMAPS[:-20],  # cut in a line: the last block lacks one
        SMAPS[: SMAPS.rindex(b"VmFlags")],
        SMAPS.replace(b"Rss:                   0", b"Pss:                   0"),
        SMAPS.replace(b"    8 kB", b"    x kB"),
    ],
)
def test_malformed_smaps(text: bytes) -> None:
    with pytest.raises(DamagedInputError, match="smaps"):
        smaps.parse(text)


def test_rollup_agrees_with_smaps(puppet: Puppet) -> None:
    with Process.open(puppet.pid) as proc:
        total = smaps.totals(proc).total
        _, account = smaps.read(proc)
    for field in ("Rss", "Private_Dirty", "Anonymous", "Swap"):
        assert total[field] == account.total[field]


def test_ten_thousand_vmas(puppet: Puppet) -> None:
    base = puppet.mmap(20_000)
    for page in range(1, 20_000, 2):
        puppet.tell("sys", 10, base + page * 4096, 4096, 1)
    shot = snapshot.take(puppet.pid)
    assert sum(base <= v.start < base + 20_000 * 4096 for v in shot.vmas) == 20_000
    assert shot.accounting is not None and len(shot.accounting.column("Rss")) == len(shot.vmas)


def test_fault_counters_of_threads(puppet: Puppet) -> None:
    tid, _ = puppet.tell("thread")
    base = puppet.island(10)
    with Process.open(puppet.pid) as proc:
        before = smaps.thread_stats(proc)
        puppet.write(base, 10)
        after = smaps.thread_stats(proc)
    assert set(after) == {puppet.pid, tid}
    assert after[puppet.pid].min_flt - before[puppet.pid].min_flt == 10
    assert after[tid].min_flt == before[tid].min_flt


def test_smaps_flagged_is_what_parse_says(puppet: Puppet) -> None:
    with Process.open(puppet.pid) as proc:
        text = proc.read("smaps")
        vmas, _, _ = smaps.parse(text)
    for flag in ("wr", "gd", "sd", "zz"):
        want = [(v.start, v.end) for v in vmas if v.vm_flags is not None and flag in v.vm_flags]
        assert smaps.flagged(text, flag.encode()) == want
    assert smaps.flagged(b"", b"sd") == []
