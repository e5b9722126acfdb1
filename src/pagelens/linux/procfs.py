"""Opening /proc/PID so that the answer is about the process that was asked for.

A pid is only a number: between two opens of /proc/PID/... the process may go and another may get the pid.
So one directory handle of /proc/PID is opened first and everything else is opened relative to it: the
handle holds the kernel's `struct pid` (fs/proc/base.c, proc_pid_make_inode), and once that process is gone
each later open fails with ESRCH, whoever has the number now. Who must find the same process again in a later
run keeps (pid, starttime) and passes the start time to `Process.open`.

Rejected: comparing start times around each read (a race stays, and it costs two reads); pidfd alone (procfs
cannot be opened through it before 6.18's PIDFD_GET_INFO days).
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import NoReturn, Self

from pagelens.vm.closing import Closing
from pagelens.vm.errors import CapabilityMissingError, DamagedInputError, TargetGoneError, UsageError

PF_EXITING = 0x4  # include/linux/sched.h: past the exit stop, the mm may be gone
PF_KTHREAD = 0x0020_0000  # include/linux/sched.h
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class TaskStat:
    """What pagelens uses of /proc/PID/stat (proc_pid_stat(5)).

    min_flt, maj_flt: faults, of the whole thread group (dead threads too) when read from /proc/PID/stat, of
    one thread from /proc/PID/task/TID/stat; cmin_flt, cmaj_flt: of waited-for children. starttime: clock
    ticks since boot. start_stack, kstkesp, start_data, end_data: addresses, 0 without permission.
    """

    pid: int
    comm: str
    state: str
    ppid: int
    flags: int
    min_flt: int
    cmin_flt: int
    maj_flt: int
    cmaj_flt: int
    utime: int
    stime: int
    num_threads: int
    starttime: int
    start_stack: int
    kstkesp: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    env_end: int

    @classmethod
    def parse(cls, data: bytes) -> TaskStat:
        """From the text of the file. The command may hold spaces and brackets, so it ends at the last ')'."""
        try:
            head, _, tail = data.rpartition(b")")
            pid, _, comm = head.partition(b" (")
            f = tail.split()
            n = [int(x) for x in f[1:]]
            # f[0] is field 3 of the man page, so field k is n[k - 4].
            return cls(
                pid=int(pid),
                comm=comm.decode(errors="replace"),
                state=f[0].decode(),
                ppid=n[0],
                flags=n[5],
                min_flt=n[6],
                cmin_flt=n[7],
                maj_flt=n[8],
                cmaj_flt=n[9],
                utime=n[10],
                stime=n[11],
                num_threads=n[16],
                starttime=n[18],
                start_stack=n[24],
                kstkesp=n[25],
                start_data=n[41],
                end_data=n[42],
                start_brk=n[43],
                arg_start=n[44],
                env_end=n[47],
            )
        except (ValueError, IndexError) as exc:
            raise DamagedInputError(f"cannot read a stat line: {data[:80]!r}") from exc


class Process(Closing):
    """A live process, held by its /proc directory. Use as a context manager.

    Raises TargetGoneError where the process is gone, a zombie or not the one that was meant; UsageError for a
    kernel thread; CapabilityMissingError, with the fix, where the privilege is missing.
    """

    def __init__(self, pid: int, dirfd: int) -> None:
        self.pid = pid
        self._dirfd = dirfd
        self._via = ""  # "task/TID/" where the leader has exited and its threads have not
        self.starttime = 0

    @classmethod
    def open(cls, pid: int, *, starttime: int | None = None) -> Self:
        """Hold process `pid`. With `starttime` (clock ticks since boot), only if it is that very process."""
        if pid <= 0:
            raise UsageError(f"not a process id: {pid}")
        try:
            dirfd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise TargetGoneError(f"no process {pid}") from None
        except PermissionError:
            raise _denied(pid, "", _owner(pid)) from None
        proc = cls(pid, dirfd)
        try:
            stat = proc.stat()
            proc.starttime = stat.starttime
            if starttime is not None and stat.starttime != starttime:
                raise TargetGoneError(f"process {pid} is gone: another process has that pid now")
            if stat.flags & PF_KTHREAD:
                raise UsageError(
                    f"{pid} ({stat.comm}) is a kernel thread: it has no address space of its own"
                )
            if stat.state in "ZX" or stat.flags & PF_EXITING:
                proc._live_thread(stat)
        except BaseException:
            proc.close()
            raise
        return proc

    def _live_thread(self, stat: TaskStat) -> None:
        # A leader that has called pthread_exit is a zombie without an mm while its threads run on; in exit_group it
        # may have dropped its mm and not be a zombie yet, while the last thread is still stopped on its way out.
        for tid in self.tasks():
            if tid == self.pid:
                continue
            other = self.stat(tid)
            if other.state not in "ZX" and not other.flags & PF_EXITING:
                self._via = f"task/{tid}/"
                return
        if stat.state not in "ZX":
            return
        raise TargetGoneError(f"process {self.pid} ({stat.comm}) is a zombie: its memory is gone already")

    def fd(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A file descriptor of /proc/PID/name; the caller closes it."""
        try:
            return os.open(self._via + name, flags | os.O_CLOEXEC, dir_fd=self._dirfd)
        except OSError as exc:
            self._fail(exc, name)

    def read(self, name: str) -> bytes:
        """The whole of /proc/PID/name."""
        fd = self.fd(name)
        try:
            return read_all(fd)
        except OSError as exc:
            self._fail(exc, name)
        finally:
            os.close(fd)

    def readlink(self, name: str) -> str:
        """Target of the link /proc/PID/name."""
        try:
            return os.readlink(self._via + name, dir_fd=self._dirfd)
        except OSError as exc:
            self._fail(exc, name)

    def tasks(self) -> list[int]:
        """Thread ids, ascending."""
        try:
            fd = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except OSError as exc:
            self._fail(exc, "task")
        try:
            return sorted(int(name) for name in os.listdir(fd))  # noqa: PTH208 (a descriptor, not a path)
        except OSError as exc:
            self._fail(exc, "task")
        finally:
            os.close(fd)

    def stat(self, tid: int | None = None) -> TaskStat:
        """Counters of the process, or of one of its threads."""
        return TaskStat.parse(self._read_plain("stat" if tid is None else f"task/{tid}/stat"))

    def read_task(self, tid: int, name: str) -> bytes:
        """The whole of /proc/PID/task/TID/name."""
        return self._read_plain(f"task/{tid}/{name}")

    def _read_plain(self, name: str) -> bytes:
        # Never through `_via`: what is asked for names its thread, or is about the group.
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except OSError as exc:
            self._fail(exc, name)
        try:
            return read_all(fd)
        except OSError as exc:
            self._fail(exc, name)
        finally:
            os.close(fd)

    def pidfd(self) -> int:
        """A pidfd of this very process (pidfd_open(2)); the caller closes it."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            raise TargetGoneError(f"process {self.pid} is gone") from None
        try:
            self.stat()  # still there after the open: so the number was still its own
        except BaseException:
            os.close(fd)
            raise
        return fd

    @property
    def alive(self) -> bool:
        """Whether this process still exists and is no zombie."""
        try:
            if self.stat().state not in "ZX":
                return True
            return bool(self._via) and self.stat(self.mm_tid).state not in "ZX"
        except TargetGoneError:
            return False

    @property
    def mm_tid(self) -> int:
        """A thread that has the address space: the leader, unless it has ended before its threads."""
        return int(self._via.split("/")[1]) if self._via else self.pid

    def _fail(self, exc: OSError, name: str) -> NoReturn:
        if exc.errno in (errno.ENOENT, errno.ESRCH):
            if not self._exists():
                raise TargetGoneError(f"process {self.pid} is gone") from None
            if name.startswith("task/"):
                raise TargetGoneError(f"a thread of process {self.pid} is gone ({name})") from None
        if exc.errno in (errno.EPERM, errno.EACCES):
            raise _denied(self.pid, name, _owner(self.pid)) from None
        if exc.errno == errno.ESRCH:
            raise TargetGoneError(f"process {self.pid} has no memory any more (it is exiting)") from None
        raise CapabilityMissingError(
            f"cannot read /proc/{self.pid}/{name}: {exc.strerror}", capability="procfs"
        ) from None

    def _exists(self) -> bool:
        try:
            os.close(os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of the process. Twice is harmless."""
        if self._dirfd >= 0:
            os.close(self._dirfd)
            self._dirfd = -1


def read_all(fd: int) -> bytes:
    """Everything from fd. seq_file answers a page at most per call, so this loops until the end."""
    parts = []
    while chunk := os.read(fd, _CHUNK):
        parts.append(chunk)
    return b"".join(parts)


def process_of(tid: int) -> int:
    """The process (thread group) of a thread; `tid` itself when it has gone.

    The last thread of a process need not be its leader, which may be a zombie by then.
    """
    with contextlib.suppress(OSError), open(f"/proc/{tid}/status") as file:
        for line in file:
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return tid


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 (a /proc path)
    except OSError:
        return None


def _denied(pid: int, name: str, owner: int | None) -> CapabilityMissingError:
    what = f"/proc/{pid}/{name}".rstrip("/")
    whose = f" (it belongs to uid {owner}, you are uid {os.geteuid()})" if owner is not None else ""
    fix = "run pagelens as root (sudo)"
    if not os.geteuid():  # a root without all rights, as in a container, and a process with more
        fix = "run pagelens with CAP_SYS_PTRACE and every capability that the process has (all of root's)"
    return CapabilityMissingError(f"no permission to read {what}{whose}", capability="other-users", fix=fix)
