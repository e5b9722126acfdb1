"""The processes of the oracle, and how they are told what to do: started, forked, executed anew, ended.

Each process or thread has a slot: a pair of pipes, and a stack in the child's region (native/oracle/oracle.c).
`proof.oracle` puts operations and views on top. Rejected: one pipe for all (a thread that waits in vfork would
hold the others up).
"""

from __future__ import annotations

import functools
import os
import select
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import pagelens
from pagelens.linux.procfs import Process
from pagelens.model import op as ops
from pagelens.model.op import Op, Outcome
from pagelens.model.world import Key
from pagelens.vm.closing import Closing
from pagelens.vm.errors import CapabilityMissingError, PagelensError, TargetGoneError
from pagelens.vm.vma import Vma, VmaList

# As in native/oracle/oracle.c.
SYSCALL, READ, WRITE, EXEC, CLONE, SETTLE, UNMAP_REST, EXECVE = range(1, 9)
SLOT_SIZE, SLOTS = 0x8000, 16
ZEROS = SLOTS - 1  # the slot that nobody runs in: 32 KiB of zeros to write from
_COMMAND = struct.Struct("<8Q")
_REPLY = struct.Struct("<q2Q2q3Q")
U64_MAX = (1 << 64) - 1

FORK = 0x8000 | 0x400 | 17  # CLONE_PARENT: we reap it; CLONE_FILES: one table of files; SIGCHLD
VFORK = 0x100 | FORK | 0x4000  # VM and VFORK as well
THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000  # VM, FS, FILES, SIGHAND, THREAD, SYSVSEM
_TOUCHES = frozenset({READ, WRITE, EXEC})
_GETPID = 39
_PATIENCE = (
    60_000  # milliseconds for an answer: on a machine with thirty waiting for two CPUs, ten seconds are few
)


class OracleError(PagelensError):
    """The child does not do what it should; a bug, or a kernel that forbids what it needs."""


@dataclass(slots=True)
class Channel:
    # A process or thread: its slot, pid (tid), and the process whose address space it has.
    slot: int
    tid: int
    process: Process
    poll: select.poll
    map_fd: int
    pagemap_fd: int
    leader: str
    looked: int = -1  # when maps was last read, counted in commands of all processes
    text: bytes = b""  # what it said, and what that means
    keys: list[Key] = field(default_factory=list)
    shown: list[Vma] = field(default_factory=list)
    vmas: VmaList | None = None


def oracle_path() -> Path:
    """Where the child's program is. CapabilityMissingError where it was not built."""
    directory = os.environ.get("PAGELENS_LIB_DIR") or str(Path(pagelens.__file__).parent / "_lib")
    path = Path(directory) / "pl-oracle"
    if not path.exists():
        raise CapabilityMissingError(
            "the oracle child is not built", capability="oracle", fix="./dev build (needs gcc and meson)"
        )
    return path


@functools.cache
def _written_back(path: str) -> str:
    # Pages of a program that was just built are dirty, and smaps says so of whoever maps them.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return path


class Children(Closing):
    """The processes of one program. `names` of processes and threads are those of the program."""

    def __init__(self) -> None:
        self._channels: dict[str, Channel] = {}
        self._free = list(range(ZEROS - 1, 0, -1))
        self._pids: set[int] = set()
        self._waiting: dict[str, str] = {}  # who stands still, and for which child of vfork
        self._moment = 0  # raised by whatever may change an address space
        self._pipes: list[tuple[int, int]] = []

    def _spawn(self) -> int:
        # The child's pid; its pipes lie where it looks for them.
        path = _written_back(str(oracle_path()))
        actions: list[tuple[int, ...]] = []
        theirs: list[int] = []
        for slot in range(ZEROS):
            command_r, command_w = os.pipe()
            reply_r, reply_w = os.pipe()
            self._pipes.append((command_w, reply_r))
            # Through a high number first: 100 and up may be in use here.
            actions += [(os.POSIX_SPAWN_DUP2, command_r, 100 + 2 * slot)]
            actions += [(os.POSIX_SPAWN_DUP2, reply_w, 101 + 2 * slot)]
            theirs += [command_r, reply_w]
        moved = [_above(fd, 200) for fd in theirs]
        actions = [(a[0], moved[i], a[2]) for i, a in enumerate(actions)]
        try:
            pid = os.posix_spawn(path, [path], {}, file_actions=actions)
        finally:
            for fd in moved:
                os.close(fd)
        self._pids.add(pid)
        return pid

    def _open(self, name: str, slot: int, tid: int, leader: str) -> None:
        poll = select.poll()
        poll.register(self._pipes[slot][1], select.POLLIN)
        if name == leader:
            process = Process.open(tid)
            fds = process.fd("maps"), process.fd("pagemap")
        else:
            process = self._channels[leader].process
            fds = self._channels[leader].map_fd, self._channels[leader].pagemap_fd
        self._channels[name] = Channel(slot, tid, process, poll, *fds, leader)

    def call(self, proc: str, number: int, *args: int) -> Outcome:
        """One system call in the child."""
        return self.send(proc, SYSCALL, number, *args)

    def process(self, proc: str) -> Process:
        """/proc/PID of a process, or of the process of a thread."""
        return self._channels[proc].process

    def leader_pid(self, proc: str) -> int:
        """The pid that a process or thread belongs to."""
        return self._channels[self._channels[proc].leader].tid

    def send(self, proc: str, what: int, nr: int = 0, *args: int) -> Outcome:
        """One command to the child (native/oracle/oracle.c), and what came of it."""
        channel = self._channels[proc]
        self._moment += 1
        words = [a & U64_MAX for a in args] + [0] * (6 - len(args))
        os.write(self._pipes[channel.slot][0], _COMMAND.pack(what, nr, *words))
        return self._answer(proc, channel, touched=what in _TOUCHES)

    def _answer(self, proc: str, channel: Channel, *, touched: bool = False) -> Outcome:
        if not channel.poll.poll(_PATIENCE):
            raise TargetGoneError(f"the oracle child {proc!r} (pid {channel.tid}) does not answer")
        data = os.read(self._pipes[channel.slot][1], _REPLY.size)
        if len(data) != _REPLY.size:
            raise TargetGoneError(f"the oracle child {proc!r} (pid {channel.tid}) is gone")
        ret, min_flt, maj_flt, sig, code, addr, done, _ = _REPLY.unpack(data)
        return Outcome(done if touched else ret, min_flt + maj_flt, sig, code, addr)

    def _vfork(self, op: Op, channel: Channel, slot: int) -> Outcome:
        # The caller answers only when the child is gone, so the child is asked who it is.
        os.write(self._pipes[channel.slot][0], _COMMAND.pack(CLONE, 0, VFORK, slot, *[0] * 4))
        os.write(self._pipes[slot][0], _COMMAND.pack(SYSCALL, _GETPID, *[0] * 6))
        either = select.poll()
        for fd in (self._pipes[channel.slot][1], self._pipes[slot][1]):
            either.register(fd, select.POLLIN)
        ready = [fd for fd, _ in either.poll(_PATIENCE)]
        if ready != [self._pipes[slot][1]]:
            raise OracleError(f"vfork of the oracle child {op.proc!r} failed")
        pid: int = _REPLY.unpack(os.read(ready[0], _REPLY.size))[0]
        self._pids.add(pid)
        self._open(op.result, slot, pid, op.result)
        self._waiting[op.proc] = op.result
        return Outcome(0)

    def _execve(self, name: str, channel: Channel) -> Outcome:
        made = self.send(name, EXECVE)
        if made.result < 0:
            raise OracleError(f"the oracle child cannot execute itself: {ops.errno_name(made.result)}")
        for other in [n for n, c in self._channels.items() if c.leader == name and n != name]:
            self._free.append(self._channels.pop(other).slot)
            self._waiting.pop(other, None)
        self._shut(channel)
        self._open(name, channel.slot, channel.tid, name)
        self._resume(name)
        return self.send(name, UNMAP_REST)

    def _resume(self, child: str) -> None:
        # Who stood still for `child` answers now.
        for who in [w for w, c in self._waiting.items() if c == child]:
            del self._waiting[who]
            if self._answer(who, self._channels[who]).result < 0:
                raise OracleError(f"vfork of the oracle child {who!r} failed")

    def _exit(self, name: str, channel: Channel) -> None:
        is_thread = name != channel.leader
        number = 60 if is_thread else 231  # exit, exit_group
        os.write(self._pipes[channel.slot][0], _COMMAND.pack(SYSCALL, number, *[0] * 6))
        if is_thread:
            deadline = time.monotonic() + _PATIENCE / 1000
            while channel.tid in channel.process.tasks() and time.monotonic() < deadline:
                time.sleep(0)
            gone = [name]
        else:
            os.waitpid(channel.tid, 0)
            self._pids.discard(channel.tid)
            gone = [other for other, c in self._channels.items() if c.leader == name]
            self._shut(channel)
            self._resume(name)
        for other in gone:
            self._free.append(self._channels.pop(other).slot)
            self._waiting.pop(other, None)

    def alive(self) -> list[str]:
        """Names of the processes and threads that exist."""
        return list(self._channels)

    @property
    def pids(self) -> frozenset[int]:
        """The processes that run now."""
        return frozenset(self._pids)

    def is_leader(self, proc: str) -> bool:
        """Whether `proc` is a process, not a second thread of one."""
        return self._channels[proc].leader == proc

    def _shut(self, channel: Channel) -> None:
        for fd in (channel.map_fd, channel.pagemap_fd):
            os.close(fd)
        channel.process.close()

    def close(self) -> None:
        """End the child and all its processes. Twice is harmless."""
        for pid in self._pids:
            os.kill(pid, 9)
        for pid in self._pids:
            os.waitpid(pid, 0)
        self._pids.clear()
        for name, channel in self._channels.items():
            if channel.leader == name:
                self._shut(channel)
        self._channels.clear()
        for pair in self._pipes:
            for fd in pair:
                os.close(fd)
        self._pipes.clear()


def _above(fd: int, least: int) -> int:
    import fcntl

    new = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(fd)
    return new
