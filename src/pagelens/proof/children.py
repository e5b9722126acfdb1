"""The processes of the oracle, and how they are told what to do: started, forked, executed anew, ended.

Each process or thread has a slot: a pair of pipes, and a stack in the child's region (native/oracle/oracle.c).
`proof.oracle` puts operations and views on top. Rejected: one pipe for all (a thread that waits in vfork would
hold the others up).
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagelens.linux.procfs import TaskStat
from pagelens.model import op as ops
from pagelens.model.op import Op, Outcome
from pagelens.model.world import Key, Span
from pagelens.proof.machine import Local, Look, Machine, Want
from pagelens.vm.closing import Closing
from pagelens.vm.errors import PagelensError, TargetGoneError
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


class OracleError(PagelensError):
    """The child does not do what it should; a bug, or a kernel that forbids what it needs."""


class Files:
    """/proc/PID of a process of the program, on its machine; what `linux.smaps` asks for."""

    def __init__(self, machine: Machine, pid: int) -> None:
        self._machine = machine
        self.pid = pid
        self.handle, self.maps, self.pagemap = machine.open(pid)

    def read(self, name: str) -> bytes:
        """The whole of one of its files."""
        return self._machine.read(self.handle, name)

    def stat(self) -> TaskStat:
        """Its counters."""
        return TaskStat.parse(self.read("stat"))

    def write(self, name: str, data: bytes) -> int:
        """Into one of its files: 0 or -errno."""
        return self._machine.write(self.handle, name, data)

    def ended(self, tid: int) -> bool:
        """Whether a thread of it ends soon."""
        return self._machine.ended(self.handle, tid)

    def shut(self) -> None:
        """Close them."""
        self._machine.shut(self.handle, (self.maps, self.pagemap))


class ChildGoneError(TargetGoneError):
    """The child has died or hangs, which no program makes it do."""


@dataclass(slots=True)
class Channel:
    # A process or thread: its slot, pid (tid), and the process whose address space it has.
    slot: int
    tid: int
    files: Files
    leader: str
    looked: int = -1  # when it was last looked at, counted in commands of all processes
    spans: Sequence[Span] = ()  # which pages of it were read last, when, and what was there
    read: int = -1
    entries: bytes = b""
    keys: list[Key] = field(default_factory=list)
    shown: list[Vma] = field(default_factory=list)
    vmas: VmaList | None = None


class Children(Closing):
    """The processes of one program. `names` of processes and threads are those of the program."""

    def __init__(self, machine: Machine | None) -> None:
        self.machine: Machine = machine or Local()
        self._channels: dict[str, Channel] = {}
        self._free = list(range(ZEROS - 1, 0, -1))
        self._pids: set[int] = set()
        self._waiting: dict[str, str] = {}  # who stands still, and for which child of vfork
        self._moment = 0  # raised by whatever may change an address space
        self._pipes: list[tuple[int, int]] = []

    def _spawn(self) -> int:
        # The child's pid; its pipes lie where it looks for them.
        pid, self._pipes = self.machine.spawn(ZEROS)
        self._pids.add(pid)
        return pid

    def _open(self, name: str, slot: int, tid: int, leader: str) -> None:
        files = Files(self.machine, tid) if name == leader else self._channels[leader].files
        self._channels[name] = Channel(slot, tid, files, leader)

    def call(self, proc: str, number: int, *args: int) -> Outcome:
        """One system call in the child."""
        return self.send(proc, SYSCALL, number, *args)

    def process(self, proc: str) -> Files:
        """/proc/PID of a process, or of the process of a thread."""
        return self._channels[proc].files

    def leader_pid(self, proc: str) -> int:
        """The pid that a process or thread belongs to."""
        return self._channels[self._channels[proc].leader].tid

    def send(self, proc: str, what: int, nr: int = 0, *args: int, look: Sequence[str] = ()) -> Outcome:
        """One command to the child (native/oracle/oracle.c), and what came of it. look: at whom, afterwards."""
        channel = self._channels[proc]
        self._moment += 1
        channels = [self._channels[name] for name in look]
        to, back = self._pipes[channel.slot]
        wants = [self._want(one) for one in channels]
        data, looks = self.machine.ask(to, _command(what, nr, args), back, _REPLY.size, wants)
        outcome = self._outcome(proc, channel, data, touched=what in _TOUCHES)
        for one, seen in zip(channels, looks, strict=True):
            self._seen(one, seen)
        return outcome

    @staticmethod
    def _want(channel: Channel) -> Want:
        return channel.files.maps, channel.files.pagemap, channel.spans

    def _seen(self, channel: Channel, look: Look) -> None:
        # Entries without a new text of maps: those of the spans that were asked for.
        text, entries = look
        channel.looked = self._moment
        if text is not None:
            self._changed(channel, text)
            return
        channel.read = self._moment
        if entries is not None:
            channel.entries = entries

    @abstractmethod
    def _changed(self, channel: Channel, text: bytes) -> None:
        """maps of a process says something new."""

    def _outcome(self, proc: str, channel: Channel, data: bytes | None, *, touched: bool = False) -> Outcome:
        if data is None:
            raise ChildGoneError(f"the oracle child {proc!r} (pid {channel.tid}) does not answer")
        if len(data) != _REPLY.size:
            fate = self.machine.fate(channel.files.pid)
            self._pids.discard(channel.files.pid)
            raise ChildGoneError(f"the oracle child {proc!r} (pid {channel.tid}) is gone: {fate}")
        ret, min_flt, maj_flt, sig, code, addr, done, _ = _REPLY.unpack(data)
        return Outcome(done if touched else ret, min_flt + maj_flt, sig, code, addr)

    def _vfork(self, op: Op, channel: Channel, slot: int) -> Outcome:
        # The caller answers only when the child is gone, so the child is asked who it is.
        (to, back), (child_to, child_back) = self._pipes[channel.slot], self._pipes[slot]
        self.machine.tell(to, _command(CLONE, 0, (VFORK, slot)))
        self.machine.tell(child_to, _command(SYSCALL, _GETPID, ()))
        if self.machine.ready((back, child_back)) != [child_back]:
            raise OracleError(f"vfork of the oracle child {op.proc!r} failed")
        pid: int = _REPLY.unpack(self.machine.answer(child_back, _REPLY.size) or b"")[0]
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
        channel.files.shut()
        self._open(name, channel.slot, channel.tid, name)
        self._resume(name)
        return self.send(name, UNMAP_REST)

    def _resume(self, child: str) -> None:
        # Who stood still for `child` answers now.
        for who in [w for w, c in self._waiting.items() if c == child]:
            del self._waiting[who]
            channel = self._channels[who]
            data = self.machine.answer(self._pipes[channel.slot][1], _REPLY.size)
            if self._outcome(who, channel, data).result < 0:
                raise OracleError(f"vfork of the oracle child {who!r} failed")

    def _exit(self, name: str, channel: Channel) -> None:
        is_thread = name != channel.leader
        number = 60 if is_thread else 231  # exit, exit_group
        self.machine.tell(self._pipes[channel.slot][0], _command(SYSCALL, number, ()))
        if is_thread:
            if not channel.files.ended(channel.tid):
                raise OracleError(f"the thread {name!r} of the oracle child does not end")
            gone = [name]
        else:
            self.machine.reap(channel.tid)
            self._pids.discard(channel.tid)
            gone = [other for other, c in self._channels.items() if c.leader == name]
            channel.files.shut()
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

    def close(self) -> None:
        """End the child and all its processes. Twice is harmless."""
        self.machine.kill(sorted(self._pids))
        self._pids.clear()
        for name, channel in self._channels.items():
            if channel.leader == name:
                channel.files.shut()
        self._channels.clear()
        self.machine.close_pipes(self._pipes)
        self._pipes = []


def _command(what: int, nr: int, args: Sequence[int]) -> bytes:
    return _COMMAND.pack(what, nr, *[a & U64_MAX for a in args], *[0] * (6 - len(args)))
