"""Holding all threads of a process: nothing lost, nothing left, every odd state refused in one sentence."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagelens.linux import hold
from pagelens.linux.hold import Held, is_held_by_us, thread_ids
from pagelens.linux.ptrace import ERESTARTSYS, Tracee
from pagelens.vm.errors import CapabilityMissingError, TargetGoneError, UsageError
from support.pace import rounds
from support.subjects import Subjects

SIGRTMIN = 34
_libc = ctypes.CDLL(None, use_errno=True)


def queue(pid: int, number: int, value: int) -> None:
    _libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    assert _libc.sigqueue(pid, number, value) == 0


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def tracer(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("TracerPid")))


def wait_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + 5
    while state(pid) not in wanted:
        assert time.monotonic() < deadline, state(pid)
        time.sleep(0.001)


@pytest.fixture
def churn(subjects: Subjects) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [subjects("churn"), "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    wait_state(process.pid, "S")
    yield process
    process.kill()
    process.wait()


def test_all_threads_while_they_come_and_go_and_every_signal_arrives(churn: subprocess.Popen[str]) -> None:
    sent = 0
    for round_ in range(300):
        queue(churn.pid, SIGRTMIN, round_)
        sent += round_
        with Held(churn.pid) as held:
            ids = thread_ids(churn.pid)
            queue(churn.pid, SIGRTMIN, 1)
            sent += 1
            alive = {tid: state_of(churn.pid, tid) for tid in ids}
            # Dead ones (past exit_mm, so without memory) may still be listed.
            assert {thread.tid for thread in held.threads} == {t for t, s in alive.items() if s not in "ZX"}
            assert set(alive.values()) <= {"t", "X", "Z"}
            assert held.threads[0].tid == churn.pid
        assert not is_held_by_us(churn.pid)
    out, _ = churn.communicate(timeout=20)
    got, total, bad = map(int, out.split()[1:4])
    assert (got, total, bad) == (600, sent, 0)
    assert int(out.split()[5]) > 300
    assert churn.returncode == 0


def state_of(pid: int, tid: int) -> str:
    try:
        return Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def test_a_signal_taken_off_the_queue_keeps_its_siginfo_when_the_thread_moved_on(
    churn: subprocess.Popen[str],
) -> None:
    # The slow path: a signal-delivery stop, then the thread is run on to another stop while it is held.
    for round_ in range(100):
        with Held(churn.pid) as held:
            thread = held.leader
            thread.cont()
            queue(churn.pid, SIGRTMIN, 7)
            stop = thread.wait(time.monotonic() + 5)
            assert stop is not None
            assert (stop.signal, stop.is_signal_delivery) == (SIGRTMIN, True)
            queue(churn.pid, SIGRTMIN, 9)
            if round_ % 2:  # as a remote system call does it
                mask = thread.sigmask()
                thread.set_sigmask(2**64 - 1)
                thread.cont()  # without passing it on
                thread.interrupt()
                assert thread.wait(time.monotonic() + 5) is not None
                thread.set_sigmask(mask)
    out, _ = churn.communicate(timeout=20)
    assert list(map(int, out.split()[1:4])) == [200, 100 * (7 + 9), 0]


@pytest.mark.parametrize("signalled", [False, True])
def test_a_call_that_ends_with_eintr_at_any_stop_goes_on(signalled: bool) -> None:
    # epoll_wait and its like are not restarted by the kernel; nobody sent a signal, so nobody shall see EINTR. One
    # that comes while it is held ends the call as it would have: a program may wait for just that.
    program = (
        "import signal; signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "import ctypes, select, os, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "e = select.epoll(); e.register(0, select.EPOLLIN); out = ctypes.create_string_buffer(12)\n"
        "print(libc.epoll_wait(e.fileno(), out, 1, -1), ctypes.get_errno(), flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child.pid}/syscall").read_text().split()[0] not in ("232", "281"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(20):
        with Held(child.pid):
            pass
        wait_state(child.pid, "S")
    if signalled:
        with Held(child.pid):
            child.send_signal(signal.SIGUSR1)
        assert child.communicate(timeout=20)[0] == "-1 4\n"
    else:
        assert child.communicate("x", timeout=20)[0] == "1 0\n"


def test_registers_round_trip_and_the_interrupted_call_is_visible(sleeper: subprocess.Popen[bytes]) -> None:
    with Held(sleeper.pid) as held:
        thread = held.leader
        regs = thread.regs()
        assert regs.orig_rax == 230  # clock_nanosleep
        assert -516 <= regs.result <= -ERESTARTSYS
        assert regs.fs_base != 0
        assert regs.cs == 0x33
        thread.set_regs(regs)
        assert thread.regs().as_dict() == regs.as_dict()
        xstate = thread.xstate()
        assert len(xstate) >= 576
        assert xstate[:464] == thread.fpregs()[:464]
        mask = thread.sigmask()
        thread.set_sigmask(mask | 1 << 9)
        assert thread.sigmask() == mask | 1 << 9
        thread.set_sigmask(mask)
        rseq = thread.rseq()
        assert rseq is not None
        assert rseq.signature in (0, 0x53053053)
        os.kill(sleeper.pid, signal.SIGUSR1)
        assert [info[0] for info in thread.queued_signals(shared=True)] == [signal.SIGUSR1]
    assert sleeper.wait(5) == -signal.SIGUSR1


def test_a_job_control_stopped_process_stays_stopped(sleeper: subprocess.Popen[bytes]) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_state(sleeper.pid, "T")
    for _ in range(20):
        with Held(sleeper.pid) as held:
            assert held.leader.stop is not None
            assert held.leader.stop.is_group_stop
        wait_state(sleeper.pid, "T")
        assert tracer(sleeper.pid) == 0
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_state(sleeper.pid, "S")


def test_a_sigstop_that_arrives_while_held_takes_effect(sleeper: subprocess.Popen[bytes]) -> None:
    with Held(sleeper.pid):
        os.kill(sleeper.pid, signal.SIGSTOP)
    wait_state(sleeper.pid, "T")
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_state(sleeper.pid, "S")


HOLD_AND_WAIT = """
import sys, time
from pagelens.linux.hold import Held
with Held(int(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_sigkill_of_the_holder_frees_the_target(churn: subprocess.Popen[str]) -> None:
    for _ in range(5):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD_AND_WAIT, str(churn.pid)], stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert state(churn.pid) == "t"
        with pytest.raises(CapabilityMissingError, match=f"already traced by {holder.pid}"):
            Held(churn.pid).__enter__()
        holder.kill()
        holder.communicate()
        assert tracer(churn.pid) == 0
        wait_state(churn.pid, "SR")
    out, _ = churn.communicate(timeout=20)
    assert out.startswith("got 0 0 0 made ")


def test_killed_while_held(sleeper: subprocess.Popen[bytes]) -> None:
    with pytest.raises(TargetGoneError), Held(sleeper.pid) as held:
        sleeper.kill()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            held.leader.regs()
    assert sleeper.wait(5) == -signal.SIGKILL  # its status is still its parent's


def test_refusals() -> None:
    with pytest.raises(UsageError, match="pagelens itself"):
        Held(os.getpid()).__enter__()
    with pytest.raises(TargetGoneError, match="no process"):
        Held(2**22 - 3).__enter__()
    if Path("/proc/2/stat").exists():
        with pytest.raises(UsageError, match="kernel thread"):
            Held(2).__enter__()
    zombie = subprocess.Popen(["true"])
    wait_state(zombie.pid, "Z")
    with pytest.raises(TargetGoneError, match="zombie"):
        Held(zombie.pid).__enter__()
    assert zombie.wait() == 0


def test_a_thread_id_is_refused_with_the_process_to_give(churn: subprocess.Popen[str]) -> None:
    other = next(tid for tid in thread_ids(churn.pid) if tid != churn.pid)
    with pytest.raises(UsageError, match=f"give {churn.pid}"):
        Held(other).__enter__()


def test_vfork_parent_is_refused_untouched(tmp_path: Path) -> None:
    source = tmp_path / "v.c"
    source.write_text("#include <unistd.h>\nint main(void){if(!vfork()){sleep(1000);_exit(0);}return 0;}\n")
    subprocess.run(["gcc", "-w", "-o", tmp_path / "v", source], check=True)
    process = subprocess.Popen([tmp_path / "v"])
    wait_state(process.pid, "D")
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    try:
        with pytest.raises(UsageError, match="uninterruptible"):
            Held(process.pid, timeout=0.2).__enter__()
        assert tracer(process.pid) == 0
        with Held(child) as held:  # the child itself can be held
            assert len(held.threads) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        assert process.wait(5) == 0


def test_without_the_right_the_fix_is_named(sleeper: subprocess.Popen[bytes]) -> None:
    if os.geteuid() != 0:
        pytest.skip("missing capability: root (a second user)")
    program = (
        "import os, sys\nos.setgid(65534); os.setuid(65534)\n"
        "from pagelens.linux.hold import Held\nfrom pagelens.vm.errors import CapabilityMissingError\n"
        f"try: Held({sleeper.pid}).__enter__()\nexcept CapabilityMissingError as e: print(e)"
    )
    source = str(Path(hold.__file__).parents[2])
    out = subprocess.run(
        [sys.executable, "-c", "import encodings.ascii, pagelens.linux.hold\n" + program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
        check=True,
    ).stdout
    assert "belongs to user 0" in out
    assert "sudo" in out
    assert state(sleeper.pid) == "S"


def test_an_exec_in_a_thread_while_seizing(subjects: Subjects) -> None:
    # A non-leader that execs becomes the leader: ids vanish and change hands between two listings.
    program = subjects("execer")
    process = subprocess.Popen([program, str(rounds(300))], stdout=subprocess.PIPE, text=True)
    held_times = 0
    while process.poll() is None and held_times < 500:
        try:
            with Held(process.pid) as held:
                assert held.threads
            held_times += 1
        except TargetGoneError:
            break
    out, _ = process.communicate(timeout=20)
    assert out == "done\n"
    assert process.returncode == 0
    assert held_times >= 1


def test_tracee_of_a_dead_thread() -> None:
    with pytest.raises(TargetGoneError):
        Tracee.seize(2**22 - 3)
