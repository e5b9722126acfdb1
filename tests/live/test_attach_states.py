"""The table of states in which a target can be: state -> exit code of `attach` -> what it says.

One test, so that the table can be read as one. Every row ends with the target as it was found: in its state, traced
by nobody but by whoever traced it before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.nobody import NOBODY, as_nobody
from support.recording import pagelens

pytestmark = pytest.mark.requires("root", "bpf", "btf", "libbpf", "perf-system", "native")


@dataclass
class Target:
    """A process in some state. tracer: that it has already."""

    pid: int
    tracer: int = 0


class Missing(Exception):
    """This machine cannot make the state: the row is left out, and said."""


Maker = Callable[[Path, contextlib.ExitStack], Target]


def _start(stack: contextlib.ExitStack, *command: str | Path, **options: object) -> int:
    child = subprocess.Popen([str(c) for c in command], **options)  # type: ignore[call-overload]

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.wait()

    stack.callback(end)
    return int(child.pid)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _until(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until, "the state did not come about"
        time.sleep(0.01)


def _child_of(pid: int, name: str) -> int:
    # The child that executes `name`: strace has others for a moment, to try what it can.
    found: list[int] = []

    def look() -> bool:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text() == f"{name}\n":
                    found.append(int(child))
        return bool(found)

    _until(look)
    return found[0]


def _compiled(directory: Path, text: str, *flags: str) -> Path:
    source, out = directory / "s.c", directory / "s"
    source.write_text(text)
    done = subprocess.run(["gcc", "-O1", "-o", out, source, *flags], capture_output=True, check=False)
    if done.returncode:
        raise Missing(f"gcc {' '.join(flags)}")
    return out


def running(_d: Path, stack: contextlib.ExitStack) -> Target:
    return Target(_start(stack, "sleep", "60"))


def gone(_d: Path, _s: contextlib.ExitStack) -> Target:
    return Target(4_000_000)


def kernel_thread(_d: Path, _s: contextlib.ExitStack) -> Target:
    return Target(2)


def zombie(_d: Path, stack: contextlib.ExitStack) -> Target:
    pid = os.fork()
    if not pid:
        os._exit(0)
    stack.callback(os.waitpid, pid, 0)
    _until(lambda: _state(pid) == "Z")
    return Target(pid)


LEADER_GONE = """
#include <pthread.h>
#include <unistd.h>
static void *work(void *a) { for (;;) usleep(1000); return a; }
int main(void) { pthread_t t; pthread_create(&t, 0, work, 0); pthread_exit(0); }
"""


def leader_gone(directory: Path, stack: contextlib.ExitStack) -> Target:
    pid = _start(stack, _compiled(directory, LEADER_GONE, "-pthread"))
    _until(lambda: _state(pid) == "Z")
    return Target(pid)


EXECS = """
#include <unistd.h>
int main(int c, char **v) { usleep(500); execl(v[0], v[0], (char *)0); return 1; }
"""


def in_exec(directory: Path, stack: contextlib.ExitStack) -> Target:
    return Target(_start(stack, _compiled(directory, EXECS)))


def stopped(_d: Path, stack: contextlib.ExitStack) -> Target:
    pid = _start(stack, "sleep", "60")
    os.kill(pid, signal.SIGSTOP)
    _until(lambda: _state(pid) == "T")
    return Target(pid)


def frozen(_d: Path, stack: contextlib.ExitStack) -> Target:
    pid = _start(stack, "sleep", "60")
    name = f"pagelens-test-{os.getpid()}"
    for base, knob, freeze, thaw in (
        (Path("/sys/fs/cgroup/freezer"), "freezer.state", "FROZEN", "THAWED"),
        (Path("/sys/fs/cgroup"), "cgroup.freeze", "1", "0"),
    ):
        group = base / name
        try:
            group.mkdir()
        except OSError:
            continue
        stack.callback(lambda group=group: _leave(group, pid))
        try:
            (group / "cgroup.procs").write_text(str(pid))
            (group / knob).write_text(freeze)
        except OSError:
            continue
        stack.callback((group / knob).write_text, thaw)
        return Target(pid)
    raise Missing("a cgroup that freezes")


def _leave(group: Path, pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)


def traced(_d: Path, stack: contextlib.ExitStack) -> Target:
    if not shutil.which("strace"):
        raise Missing("strace")
    tracer = _start(stack, "strace", "-o", "/dev/null", "sleep", "60")
    pid = _child_of(tracer, "sleep")
    stack.callback(_kill, pid)
    _until(lambda: f"TracerPid:\t{tracer}" in Path(f"/proc/{pid}/status").read_text())
    return Target(pid, tracer)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def other_user(_d: Path, stack: contextlib.ExitStack) -> Target:
    return Target(_start(stack, "sleep", "60", user=NOBODY, group=NOBODY))


def other_namespace(_d: Path, stack: contextlib.ExitStack) -> Target:
    if not shutil.which("unshare"):
        raise Missing("unshare")
    pid = _child_of(
        _start(stack, "unshare", "--pid", "--fork", "sleep", "60", stderr=subprocess.DEVNULL), "sleep"
    )
    stack.callback(_kill, pid)
    return Target(pid)


def setuid(directory: Path, stack: contextlib.ExitStack) -> Target:
    program = directory / "suid"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o4755)
    pid = _start(stack, program, "60", user=NOBODY, group=NOBODY)
    _until(lambda: Path(f"/proc/{pid}/exe").readlink() == program)
    return Target(pid)


THIRTY_TWO = """
/* No libc, so that no multilib is needed. nanosleep is 162. */
void _start(void) { static int t[2] = {0, 10000000}; for (;;) { int r;
  __asm__ volatile("int $0x80" : "=a"(r) : "a"(162), "b"(t), "c"(0) : "memory"); } }
"""


def thirty_two_bits(directory: Path, stack: contextlib.ExitStack) -> Target:
    flags = ("-m32", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-ffreestanding", "-fno-stack-protector")
    return Target(_start(stack, _compiled(directory, THIRTY_TWO, *flags)))


# state, as root?, exit code, what the message says.
TABLE: list[tuple[Maker, bool, int, str]] = [
    (running, True, 0, "unexplained 0"),
    (stopped, True, 0, "unexplained 0"),
    (frozen, True, 0, "unexplained 0"),
    (traced, True, 0, "unexplained 0"),
    (leader_gone, True, 0, "unexplained 0"),
    (in_exec, True, 0, "unexplained 0"),
    (other_user, True, 0, "unexplained 0"),
    (other_namespace, True, 0, "unexplained 0"),
    (setuid, True, 0, "unexplained 0"),
    (thirty_two_bits, True, 0, "unexplained 0"),
    (gone, True, 4, "no process 4000000"),
    (zombie, True, 4, "is a zombie"),
    (kernel_thread, True, 2, "is a kernel thread: it has no address space of its own"),
    (gone, False, 4, "no process 4000000"),
    (kernel_thread, False, 2, "is a kernel thread"),
    (running, False, 3, "is another user's, or has more rights than we (setuid); fix: sudo pagelens attach"),
    (setuid, False, 3, "is another user's, or has more rights than we (setuid); fix: sudo pagelens attach"),
    (other_user, False, 0, "unexplained 0"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may use."""
    with tempfile.TemporaryDirectory(prefix="pagelens-test-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_state_exit_code_message(place: Path) -> None:
    left_out = []
    for make, root, code, text in TABLE:
        state = f"{make.__name__}, {'root' if root else 'nobody'}"
        with contextlib.ExitStack() as stack:
            try:
                target = make(place, stack)
            except Missing as why:
                left_out.append(f"{state}: {why}")
                continue
            capture = place / "a.plens"
            argv = ["attach", str(target.pid), "--duration", "0.1", "-c", str(capture), "--force"]
            warm = ["attach", str(os.getpid()), "--duration", "0", "--method", "perf"]
            warm += ["--force", "-c", str(place / "warm.plens")]
            done = pagelens(*argv) if root else as_nobody(argv, [warm], place)
            assert done.returncode == code, (state, done.stderr)
            assert text in done.stderr, (state, done.stderr)
            assert "Traceback" not in done.stderr, (state, done.stderr)
            errors = [line for line in done.stderr.splitlines() if "attaching to" not in line]
            if code:
                assert len(errors) == 1, (state, done.stderr)
                assert not capture.exists(), state
            else:
                shutil.rmtree(capture)
                assert f"TracerPid:\t{target.tracer}\n" in Path(f"/proc/{target.pid}/status").read_text(), (
                    state
                )
                if make is stopped:
                    assert _state(target.pid) == "T"
    if left_out:
        sys.stderr.write(f"rows left out: {'; '.join(left_out)}\n")
    assert len(left_out) <= 4, left_out
