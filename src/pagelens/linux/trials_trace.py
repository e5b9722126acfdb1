"""Trials of tracing, and of reaching another process: perf, tracefs, BPF, ptrace, process_vm_readv,
pidfd_getfd.

What needs another process uses a `sleep` child of our own, killed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pagelens.linux.trials import AS_ROOT, NO_FIX, Outcome, _raw, syscall

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYS_PERF_EVENT_OPEN, _SYS_BPF, _SYS_PIDFD_GETFD = 298, 321, 438
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_PTRACE_DETACH, _PTRACE_SEIZE = 17, 0x4206
_PERF_FIX = "sudo sysctl kernel.perf_event_paranoid={} (or CAP_PERFMON, or root)"
_TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def _perf_open(pid: int, cpu: int, exclude_kernel: bool) -> int:
    # struct perf_event_attr, first version (64 bytes): PERF_TYPE_SOFTWARE, PERF_COUNT_SW_PAGE_FAULTS_MIN.
    bits = (1 << 5) if exclude_kernel else 0
    attr = struct.pack("IIQQQQQIIQ", 1, 64, 5, 0, 0, 0, bits, 0, 0, 0)
    buffer = ctypes.create_string_buffer(attr, 64)
    return _raw(_SYS_PERF_EVENT_OPEN, ctypes.addressof(buffer), pid, cpu, -1, 8)


def _perf(pid: int, cpu: int, exclude_kernel: bool) -> Outcome:
    try:
        fd = _perf_open(pid, cpu, exclude_kernel)
    except OSError as exc:
        paranoid = Path("/proc/sys/kernel/perf_event_paranoid")
        level = paranoid.read_text().strip() if paranoid.exists() else "no perf in this kernel"
        # perf_event_paranoid(2): 2 user mode of own processes, 1 kernel mode too, 0 whole CPUs.
        wanted = 0 if cpu >= 0 else 2 if exclude_kernel else 1
        return Outcome(False, f"{exc.strerror} (perf_event_paranoid {level})", _PERF_FIX.format(wanted))
    try:
        before = struct.unpack("Q", os.read(fd, 8))[0]
        with mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            for page in range(64):
                memory[page * 4096] = 1
        seen = struct.unpack("Q", os.read(fd, 8))[0] - before
    finally:
        os.close(fd)
    if cpu < 0 and seen < 64:
        return Outcome(False, f"opened, but counted {seen} of 64 faults", NO_FIX)
    return Outcome(True, "opened" if cpu >= 0 else "64 faults counted of 64")


def perf_own() -> Outcome:
    """Count user-mode page faults of this process: 64 of 64."""
    return _perf(0, -1, True)


def perf_kernel() -> Outcome:
    """Likewise with kernel mode."""
    return _perf(0, -1, False)


def perf_system() -> Outcome:
    """Open the event for all processes on CPU 0."""
    return _perf(-1, 0, False)


def tracefs() -> Outcome:
    """Read a tracepoint's id, and make and remove a private instance; mounts it for itself where nobody
    did."""
    for base in map(Path, _TRACEFS):
        try:
            found = _tracefs_works(os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except PermissionError:
            return Outcome(False, f"{base} cannot be read", AS_ROOT)
        except OSError:
            continue
        return Outcome(found, f"{base}, private instances work", NO_FIX)
    try:
        found = _tracefs_works(_detached_tracefs())
    except OSError as exc:
        why = f"not mounted, and cannot be ({exc.strerror})"
        return Outcome(False, why, "sudo mount -t tracefs tracefs /sys/kernel/tracing")
    return Outcome(found, "not mounted, but root can reach it by a mount of its own", NO_FIX)


def _detached_tracefs() -> int:
    # fsopen, fsconfig(FSCONFIG_CMD_CREATE), fsmount: a mount that nobody else sees; gone with the descriptor.
    name = ctypes.create_string_buffer(b"tracefs")
    context = _raw(_SYS_FSOPEN, ctypes.addressof(name), 1)
    try:
        _raw(_SYS_FSCONFIG, context, 6, 0, 0, 0)
        return _raw(_SYS_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)


def _tracefs_works(base: int) -> bool:
    # Closes `base`.
    try:
        fd = os.open("events/raw_syscalls/sys_enter/id", os.O_RDONLY | os.O_CLOEXEC, dir_fd=base)
        try:
            number = os.read(fd, 32).strip().isdigit()
        finally:
            os.close(fd)
        instance = f"instances/pagelens-trial-{os.getpid()}"
        os.mkdir(instance, dir_fd=base)
        os.rmdir(instance, dir_fd=base)
        return number
    finally:
        os.close(base)


def bpf() -> Outcome:
    """Load a tracepoint program that does nothing (r0 = 0; exit)."""
    program = ctypes.create_string_buffer(struct.pack("QQ", 0x00000000000000B7, 0x0000000000000095), 16)
    license_ = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack("IIQQ", 5, 2, ctypes.addressof(program), ctypes.addressof(license_)).ljust(72, b"\0")
    buffer = ctypes.create_string_buffer(attr, 72)
    try:
        os.close(_raw(_SYS_BPF, 5, ctypes.addressof(buffer), 72))
    except OSError as exc:
        fix = NO_FIX if exc.errno == errno.ENOSYS else f"{AS_ROOT}: needs CAP_BPF and CAP_PERFMON"
        return Outcome(False, exc.strerror or "", fix)
    return Outcome(True, "a program was loaded")


def btf() -> Outcome:
    """/sys/kernel/btf/vmlinux can be read."""
    path = Path("/sys/kernel/btf/vmlinux")
    if not path.exists():
        return Outcome(False, "no BTF", "boot a kernel with CONFIG_DEBUG_INFO_BTF")
    with path.open("rb") as file:
        magic = file.read(2)
    return Outcome(magic == b"\x9f\xeb", f"{path.stat().st_size >> 20} MiB", NO_FIX)


def libbpf() -> Outcome:
    """libbpf.so.1 loads."""
    try:
        library = ctypes.CDLL("libbpf.so.1")
    except OSError:
        return Outcome(False, "libbpf.so.1 is not installed", "sudo apt-get install -y libbpf1")
    library.libbpf_version_string.restype = ctypes.c_char_p
    return Outcome(True, library.libbpf_version_string().decode())


def libdw() -> Outcome:
    """libdw.so.1 loads."""
    try:
        ctypes.CDLL("libdw.so.1")
    except OSError:
        return Outcome(False, "libdw.so.1 is not installed", "sudo apt-get install -y elfutils")
    return Outcome(True, "libdw.so.1 loads")


@contextlib.contextmanager
def _sleeper(user: int | None = None) -> Iterator[int]:
    # It answers before it is used: Popen returns in the middle of exec, when the new address space holds no
    # more than a stack that is about to move (begin_new_exec closes the pipe that Popen waits for).
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["cat"], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, user=user, cwd="/"
    ) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b"!")
            child.stdin.flush()
            child.stdout.read(1)
            yield child.pid
        finally:
            child.kill()


def other_users() -> Outcome:
    """Reading the maps of a process of another user: a child as nobody; without root, process 1."""
    if os.geteuid():
        Path("/proc/1/maps").read_bytes()
        return Outcome(True, "/proc/1/maps can be read", AS_ROOT)
    with _sleeper(user=65534) as pid:
        Path(f"/proc/{pid}/maps").read_bytes()
    try:
        Path("/proc/1/maps").read_bytes()
    except PermissionError:
        return Outcome(True, "yes, but not those with capabilities that we lack (process 1)")
    return Outcome(True, "all")


def ptrace() -> Outcome:
    """Seize a child, and let it go."""
    with _sleeper() as pid:
        long = ctypes.c_long
        try:
            syscall("ptrace", _LIBC.ptrace(long(_PTRACE_SEIZE), long(pid), long(0), long(0)))
        except OSError as exc:
            fix = "sudo sysctl kernel.yama.ptrace_scope=1; in a container: docker run --cap-add SYS_PTRACE"
            return Outcome(False, exc.strerror or "", fix)
        # Not stopped, so DETACH fails; killing the child ends the trace.
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    note = f"yama scope {scope.read_text().strip()}" if scope.exists() else "no yama"
    return Outcome(True, f"a child was seized; {note}")


def process_vm_readv() -> Outcome:
    """Read the ELF magic of a child."""
    with _sleeper() as pid:
        line = Path(f"/proc/{pid}/maps").read_text().splitlines()[0]
        start = int(line.partition("-")[0], 16)
        buffer = ctypes.create_string_buffer(4)
        local = struct.pack("QQ", ctypes.addressof(buffer), 4)
        remote = struct.pack("QQ", start, 4)
        try:
            got = _LIBC.process_vm_readv(
                pid, ctypes.c_char_p(local), ctypes.c_ulong(1), ctypes.c_char_p(remote), ctypes.c_ulong(1),
                ctypes.c_ulong(0),
            )  # fmt: skip
            syscall("process_vm_readv", got)
        except OSError as exc:
            return Outcome(False, exc.strerror or "", "allow process_vm_readv in the container (SYS_PTRACE)")
    return Outcome(got == 4, f"read {got} bytes of a child", NO_FIX)


def pidfd_getfd() -> Outcome:
    """Take the standard output of a child."""
    with _sleeper() as pid:
        fd = os.pidfd_open(pid)
        try:
            os.close(_raw(_SYS_PIDFD_GETFD, fd, 1, 0))
        finally:
            os.close(fd)
    return Outcome(True, "a descriptor of a child was taken", AS_ROOT)


def kcore() -> Outcome:
    """/proc/kcore can be read."""
    path = Path("/proc/kcore")
    if not path.exists():
        return Outcome(False, "no /proc/kcore", "boot a kernel with CONFIG_PROC_KCORE")
    with path.open("rb") as file:
        magic = file.read(4)
    return Outcome(magic == b"\x7fELF", "can be read", AS_ROOT)
