"""The states in which a target can be, made: running, stopped, frozen, traced, exiting, in exec, of another user…

Each maker takes a directory that every user may use, and an exit stack that undoes what it did.
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
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pagelens.linux import ptrace
from pagelens.vm.errors import TargetGoneError
from support.nobody import NOBODY


@dataclass
class Target:
    """A process in some state. tracer: that it has already."""

    pid: int
    tracer: int = 0


class MissingError(Exception):
    """This machine cannot make the state: the row is left out, and said."""


Maker = Callable[[Path, contextlib.ExitStack], Target]
T = TypeVar("T")


@contextlib.contextmanager
def open_place() -> Iterator[Path]:
    """A directory that every user may use."""
    with tempfile.TemporaryDirectory(prefix="pagelens-test-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def each_row(
    table: Sequence[tuple[Maker, bool, T, str]], place: Path
) -> Generator[tuple[str, Target, contextlib.ExitStack, tuple[Maker, bool, T, str]], None, None]:
    """(its name, the target, what undoes it, the row) for each row of a table (state, as root?, exit code, text).
    States that this machine cannot make are left out, named on stderr, and four at the most."""
    left_out = []
    for line in table:
        row = f"{line[0].__name__}, {'root' if line[1] else 'nobody'}"
        with contextlib.ExitStack() as stack:
            try:
                target = line[0](place, stack)
            except MissingError as why:
                left_out.append(f"{row}: {why}")
                continue
            yield row, target, stack, line
    if left_out:
        sys.stderr.write(f"rows left out: {'; '.join(left_out)}\n")
    assert len(left_out) <= 4, left_out


def start(stack: contextlib.ExitStack, *command: str | Path, **options: object) -> int:
    child = subprocess.Popen([str(c) for c in command], **options)  # type: ignore[call-overload]

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.wait()

    stack.callback(end)
    return int(child.pid)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "the state did not come about"
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

    until(look)
    return found[0]


def _compiled(directory: Path, text: str, *flags: str) -> Path:
    source, out = directory / "s.c", directory / "s"
    source.write_text(text)
    done = subprocess.run(["gcc", "-O1", "-o", out, source, *flags], capture_output=True, check=False)
    if done.returncode:
        raise MissingError(f"gcc {' '.join(flags)}")
    return out


def running(_d: Path, stack: contextlib.ExitStack) -> Target:
    return Target(start(stack, "sleep", "60"))


def gone(_d: Path, _s: contextlib.ExitStack) -> Target:
    return Target(4_000_000)


def kernel_thread(_d: Path, _s: contextlib.ExitStack) -> Target:
    return Target(2)


def zombie(_d: Path, stack: contextlib.ExitStack) -> Target:
    pid = os.fork()
    if not pid:
        os._exit(0)
    stack.callback(os.waitpid, pid, 0)
    until(lambda: state(pid) == "Z")
    return Target(pid)


LEADER_GONE = """
#include <pthread.h>
#include <unistd.h>
static void *work(void *a) { for (;;) usleep(1000); return a; }
int main(void) { pthread_t t; pthread_create(&t, 0, work, 0); pthread_exit(0); }
"""


def leader_gone(directory: Path, stack: contextlib.ExitStack) -> Target:
    pid = start(stack, _compiled(directory, LEADER_GONE, "-pthread"))
    until(lambda: state(pid) == "Z")
    return Target(pid)


EXECS = """
#include <unistd.h>
int main(int c, char **v) { usleep(500); execl(v[0], v[0], (char *)0); return 1; }
"""


def in_exec(directory: Path, stack: contextlib.ExitStack) -> Target:
    return Target(start(stack, _compiled(directory, EXECS)))


def in_exec_at_times(directory: Path, stack: contextlib.ExitStack) -> Target:
    return Target(start(stack, _compiled(directory, EXECS.replace("500", "60000"))))


def stopped(_d: Path, stack: contextlib.ExitStack) -> Target:
    pid = start(stack, "sleep", "60")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) == "T")
    return Target(pid)


def frozen(_d: Path, stack: contextlib.ExitStack) -> Target:
    pid = start(stack, "sleep", "60")
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
    raise MissingError("a cgroup that freezes")


def _leave(group: Path, pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)


def traced(_d: Path, stack: contextlib.ExitStack) -> Target:
    if not shutil.which("strace"):
        raise MissingError("strace")
    tracer = start(stack, "strace", "-o", "/dev/null", "sleep", "60")
    pid = _child_of(tracer, "sleep")
    stack.callback(_kill, pid)
    until(lambda: f"TracerPid:\t{tracer}" in Path(f"/proc/{pid}/status").read_text())
    return Target(pid, tracer)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def other_user(_d: Path, stack: contextlib.ExitStack) -> Target:
    return Target(start(stack, "sleep", "60", user=NOBODY, group=NOBODY))


def other_namespace(_d: Path, stack: contextlib.ExitStack) -> Target:
    if not shutil.which("unshare"):
        raise MissingError("unshare")
    pid = _child_of(
        start(stack, "unshare", "--pid", "--fork", "sleep", "60", stderr=subprocess.DEVNULL), "sleep"
    )
    stack.callback(_kill, pid)
    return Target(pid)


def setuid(directory: Path, stack: contextlib.ExitStack) -> Target:
    program = directory / "suid"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o4755)
    pid = start(stack, program, "60", user=NOBODY, group=NOBODY)
    until(lambda: Path(f"/proc/{pid}/exe").readlink() == program)
    return Target(pid)


THIRTY_TWO = """
/* No libc, so that no multilib is needed. nanosleep is 162. */
void _start(void) { static int t[2] = {0, 10000000}; for (;;) { int r;
  __asm__ volatile("int $0x80" : "=a"(r) : "a"(162), "b"(t), "c"(0) : "memory"); } }
"""


def thirty_two_bits(directory: Path, stack: contextlib.ExitStack) -> Target:
    flags = ("-m32", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-ffreestanding", "-fno-stack-protector")
    return Target(start(stack, _compiled(directory, THIRTY_TWO, *flags)))


CONFINED = """
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <unistd.h>
int main(void) {
  struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog program = {1, &allow};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 1;
  for (;;) pause();
}
"""


def confined(directory: Path, stack: contextlib.ExitStack) -> Target:
    pid = start(stack, _compiled(directory, CONFINED))
    until(lambda: "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text())
    return Target(pid)


OWN_USERFAULTFD = """
#define _GNU_SOURCE
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
  int fd = syscall(SYS_userfaultfd, 1);
  struct uffdio_api api = {.api = UFFD_API};
  char *at = mmap(0, 64 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  struct uffdio_register range = {.range = {(unsigned long)at, 64 << 10}, .mode = UFFDIO_REGISTER_MODE_WP};
  if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range)) return 1;
  for (;;) { *(volatile char *)(at + (64 << 10) - 1) = 1; usleep(1000); }
}
"""


def own_userfaultfd(directory: Path, stack: contextlib.ExitStack) -> Target:
    pid = start(stack, _compiled(directory, OWN_USERFAULTFD))
    until(lambda: " uw" in Path(f"/proc/{pid}/smaps").read_text())
    return Target(pid)


_O_EXIT, _E_EXIT = 1 << 6, 6  # PTRACE_O_TRACEEXIT, PTRACE_EVENT_EXIT


def mid_exit(_d: Path, stack: contextlib.ExitStack) -> Target:
    """In do_exit, held at its exit stop by a tracer: it is no zombie yet, and its memory is still there."""
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pause()
        os._exit(0)
    ptrace.request(ptrace.PTRACE_SEIZE, pid, 0, _O_EXIT)

    def end() -> None:
        with contextlib.suppress(TargetGoneError):
            ptrace.request(ptrace.PTRACE_DETACH, pid, 0, 0)
        assert os.waitpid(pid, 0)[1] == signal.SIGTERM, "it ended otherwise than it would have"

    stack.callback(end)
    os.kill(pid, signal.SIGTERM)
    while (status := os.waitpid(pid, 0)[1]) >> 16 != _E_EXIT:
        assert os.WIFSTOPPED(status)
        ptrace.request(ptrace.PTRACE_CONT, pid, 0, os.WSTOPSIG(status))
    return Target(pid, os.getpid())


EXITING = """
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
static void *work(void *a) { for (;;) usleep(100); return a; }
int main(void) {
  pthread_t t;
  for (int i = 0; i < 4; i++) pthread_create(&t, 0, work, 0);
  char *at = mmap(0, 256 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  usleep(150000);
  _exit(at == MAP_FAILED);
}
"""


def exiting(directory: Path, stack: contextlib.ExitStack) -> Target:
    return Target(start(stack, _compiled(directory, EXITING)))
